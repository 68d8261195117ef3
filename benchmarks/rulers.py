"""Networks of known accuracy and their labelled images: a ruler, on which nothing is trained but `real_images`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adadfq_plugin import zoo
from adadfq_plugin.backends.fx import best_engine
from adadfq_plugin.demo import DEMO_MODELS, demo_model

ASSETS = Path(
    os.environ.get("ADADFQ_ASSETS", Path(__file__).parents[1] / ".." / "shared" / "assets")
).resolve()
CIFAR = ("resnet20", "resnet44", "vit_cifar10")
NETWORKS = (*CIFAR, *DEMO_MODELS)
FIRST = 2500
"""Images of CIFAR-10 that no method sees; those behind them are the real images of `real_images`."""


def use_best_kernels() -> None:
    """The integer kernels of the best engine; on a GPU, float32 as on a CPU."""
    torch.backends.quantized.engine = best_engine()
    torch.backends.cudnn.allow_tf32 = False


def load(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network in eval mode, and the facts of its images as `adadfq_plugin.calibrate` takes them."""
    if name not in CIFAR:
        model = demo_model(name)
        facts = zoo.facts(model)
        return model, {"input_size": facts.input_size, "mean": facts.mean, "std": facts.std}
    resnets = _asset("cifar_resnet")
    model = _asset("cifar_vit").load() if name == "vit_cifar10" else resnets.load(name)
    return model, {"input_size": (3, 32, 32), "mean": resnets.MEAN, "std": resnets.STD}


def images(name: str) -> tuple[Tensor, Tensor]:
    """All labelled images for a network, normalised, and their labels."""
    if name not in CIFAR:
        model = demo_model(name)
        crop = zoo.crop_mode(model)
        batches = list(zoo.validation_loader(ASSETS / "imagenet_eval", zoo.facts(model), crop_mode=crop))
        return torch.cat([pixels for pixels, _ in batches]), torch.cat([labels for _, labels in batches])
    resnets, arrays = _asset("cifar_resnet"), np.load(ASSETS / "cifar10_eval.npz")
    pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (resnets.MEAN, resnets.STD))
    return (pixels - mean) / std, torch.from_numpy(arrays["labels"])


@torch.no_grad()
def logits(network: nn.Module, images: Tensor, device: str = "cpu") -> Tensor:
    """What a network says of images, on the CPU; it is moved to the device, and back."""
    network.to(device)
    answers = [network(batch.to(device)).cpu() for batch in images.split(100)]
    network.to("cpu")
    return torch.cat(answers)


def seen(name: str, count: int) -> Tensor:
    """Which of the ``count`` images `real_images` sees: CIFAR-10's second half, 64 of ImageNet's over all classes."""
    mask = torch.zeros(count, dtype=torch.bool)
    if name in CIFAR:
        mask[FIRST:] = True
    else:
        mask[: 64 * 7 : 7] = True
    return mask


def _asset(module: str) -> Any:
    if str(ASSETS) not in sys.path:
        sys.path.append(str(ASSETS))
    return importlib.import_module(module)
