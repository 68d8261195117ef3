"""Random images, and networks of random weights that tell them apart."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

BATCHES, BATCH = 3, 8
SETTLED = BATCHES * BATCH
"""Images that statistics are taken of."""
BRANCH = 0.2
"""What scales a residual branch that timm starts at (nearly) zero: with it, the branch would never be seen."""
BRANCH_NAMES = ("gamma", "layer_scale", "ls")


def random_images(count: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Images with structure of every scale, from one colour all over to white noise, in random proportions."""
    channels, height, width = size
    images = torch.zeros(count, *size)
    side = 1
    while side < 2 * max(height, width):
        grid = (min(side, height), min(side, width))
        noise = torch.randn(count, channels, *grid, generator=generator)
        octave = F.interpolate(noise, (height, width), mode="bilinear", align_corners=False)
        images += torch.rand(count, 1, 1, 1, generator=generator) * octave
        side *= 2
    return images / images.std()


@torch.no_grad()
def settle(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Give a model of random weights what training would: statistics, branches that count, logits that vary.

    In place. BatchNorm averages the statistics of a few batches; scales of residual branches that timm starts below
    0.2 are set to that; and an affine change of the classifier gives every logit mean 0 and deviation 1 over images.
    """
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        normed = last == "weight" and "Norm" in type(model.get_submodule(owner)).__name__
        if normed or last.startswith(BRANCH_NAMES):
            parameter[parameter.abs() < BRANCH] = BRANCH
    norms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the plain average of all batches
        norm.reset_running_stats()
        norm.train()
    for _ in range(BATCHES if norms else 0):
        model(random_images(BATCH, size, generator))
    model.eval()
    layers = classifiers(model)
    for layer in layers:
        if not layer.weight.any():
            nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
    batches = [model(random_images(BATCH, size, generator)) for _ in range(BATCHES)]
    logits = torch.cat([each if isinstance(each, Tensor) else each[0] for each in batches])
    scale = 1 / logits.std(0).clamp_min(torch.finfo(logits.dtype).tiny)
    shift = -logits.mean(0) * scale
    for layer in layers:
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        old = 0 if layer.bias is None else layer.bias * scale
        layer.bias = nn.Parameter(old + shift)


def classifiers(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The layers that give the logits; where there are several, the model averages them."""
    found = model.get_classifier()  # type: ignore[operator]
    heads = found if isinstance(found, tuple) else (found,)
    modules = [module for head in heads for module in head.modules()]
    layers = [module for module in modules if isinstance(module, (nn.Linear, nn.Conv2d))]
    return [each for each in layers if each.weight.shape[0] == model.num_classes]
