"""Where the time and the memory of a step go, part by part, beside how each part is written plainly.

    python benchmarks/steps.py --networks resnet20 tf_efficientnet_lite0

Plainly means: torch's own learned fake-quantize kernels; P with gradients for its weights, as a network has that nobody
froze; and for Q the quantization-aware modules of torch.ao's default QConfig, with BatchNorm inside the convolutions
and activations matched by ``F.mse_loss``. What is measured are medians of forward and backward passes on one batch;
memory is what autograd keeps from the one to the other.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import rulers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import disable_fake_quant, disable_observer, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.benchmark import Timer

import adadfq_plugin
from adadfq_plugin.backends.fx import FXBackend, traceable
from adadfq_plugin.captures import capture_inputs, capture_outputs
from adadfq_plugin.config import AdaDFQSettings
from adadfq_plugin.contracts import Phase, Prepared
from adadfq_plugin.facts import find_facts
from adadfq_plugin.fake_quantize import LearnedQuantizer
from adadfq_plugin.functional import kl_divergence_loss
from adadfq_plugin.game.generator import GeneratorPlayer
from adadfq_plugin.game.pace import Pace
from adadfq_plugin.game.quantized import QuantizedPlayer
from adadfq_plugin.game.run import PIECE
from adadfq_plugin.hooks import fork_rng
from adadfq_plugin.teacher import Teacher, make_teacher

Step = Callable[[], Any]
SECONDS = 2.0
"""For each median."""


@dataclass
class Part:
    """A part of a step as it is here, and plainly."""

    name: str
    here: Step
    plain: Step | None = None


def backward(output: Tensor, inputs: Sequence[Tensor]) -> None:
    """Gradients of a sum, thrown away."""
    torch.autograd.grad(output.sum(), inputs, allow_unused=True)


def of_teacher(teacher: Teacher, images: Tensor) -> Part:
    """P between G and the losses: what a step of G or of the refinement asks of it."""
    asked = images.clone().requires_grad_(True)
    free = copy.deepcopy(teacher.model).requires_grad_(True)
    weights = list(free.parameters())
    return Part(
        "P, forward and backward to the images",
        lambda: backward(teacher(asked), [asked]),
        lambda: backward(free(asked), [asked, *weights]),
    )


def of_generator(player: GeneratorPlayer) -> Part:
    """G alone."""
    return Part("G, forward and backward", lambda: backward(player.make()[0], list(player.parameters)))


def of_quantizers(opened: Prepared, images: Tensor) -> Iterator[Part]:
    """The fake quantizers of one pass, of weights and of activations, without the layers between them."""
    quantizers = {n: m for n, m in opened.module.named_modules() if isinstance(m, LearnedQuantizer)}
    with capture_inputs(quantizers) as inputs, torch.no_grad(), opened.phase(Phase.TRAIN):
        opened.module(images)
    seen = {name: value.detach().requires_grad_(True) for name, value in inputs.items()}
    for name, per_channel in (("activations", False), ("weights", True)):
        chosen = [
            (quantizers[each], x) for each, x in seen.items() if quantizers[each].per_channel == per_channel
        ]

        def here(chosen: Any = chosen) -> None:
            with opened.phase(Phase.TRAIN):
                for quantizer, x in chosen:
                    backward(quantizer(x), [x, quantizer.log_scale])

        def plain(chosen: Any = chosen) -> None:
            for quantizer, x in chosen:
                scale = quantizer.scale.detach().requires_grad_(True)
                zero = quantizer.zero_point.float().requires_grad_(True)
                limits = quantizer.quant_min, quantizer.quant_max, 1.0
                if quantizer.per_channel:
                    axis = quantizer.ch_axis
                    y = torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, axis, *limits)
                else:
                    y = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, *limits)
                backward(y, [x, scale])

        yield Part(f"fake quantizers of {name}, forward and backward", here, plain)


def of_quantized(opened: Prepared, plain: nn.Module, images: Tensor) -> Part:
    """Q with its quantizers."""
    ours, theirs = [*opened.weights(), *opened.steps()], list(plain.parameters())

    def here() -> None:
        with opened.phase(Phase.TRAIN):
            backward(opened.module(images), ours)

    return Part("Q, forward and backward", here, lambda: backward(plain(images), theirs))


def of_update(learner: QuantizedPlayer) -> Part:
    """Adam in quantization steps, beside Adam."""
    gradients = [torch.randn_like(each) for each in learner.parameters]
    copies = [each.detach().clone().requires_grad_(True) for each in learner.parameters]
    adam = torch.optim.Adam(copies, lr=1e-4)

    def plain() -> None:
        for parameter, gradient in zip(copies, gradients, strict=True):
            parameter.grad = gradient
        adam.step()

    return Part("Q's update", lambda: learner.update(list(gradients)), plain)


def of_lesson(learner: QuantizedPlayer, plain: nn.Module, images: Tensor, size: int | None) -> Part:
    """All of a step of Q: what P answers, both losses, their gradients, and the update."""
    teacher = copy.deepcopy(plain).apply(disable_observer).apply(disable_fake_quant)
    names = [name for name, _ in plain.named_children() if name.startswith("activation_post_process")]
    adam = torch.optim.Adam(plain.parameters(), lr=0.0)

    def here() -> None:
        with learner.learning():
            learner.learn(images, size)

    def theirs() -> None:
        adam.zero_grad()
        with (
            capture_outputs({name: teacher.get_submodule(name) for name in names}) as of_p,
            capture_outputs({name: plain.get_submodule(name) for name in names}) as of_q,
        ):
            with torch.no_grad():
                z_p = teacher(images)
            loss = kl_divergence_loss(z_p, plain(images), temperature=learner.settings.temperature)
        hints = [F.mse_loss(of_q[name], of_p[name]) / of_p[name].var() for name in of_q]
        (loss + torch.stack(hints).mean()).backward()
        adam.step()

    return Part("a step of Q, all of it", here, theirs)


def kept(step: Step) -> float:
    """MiB of the tensors that autograd keeps for the backward pass, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values()) / 2**20


def median(step: Step) -> float:
    """Milliseconds of one call."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=SECONDS).median


def parts(name: str, bits: int) -> Iterator[Part]:
    """All parts of a network's step, at the default batch sizes."""
    model, facts = rulers.load(name)
    scheme = adadfq_plugin.Scheme(weight_bits=bits, activation_bits=bits)
    kit = FXBackend()
    known = find_facts(model, **facts)
    opened = kit.open(kit.prepare(model, known.input_size, scheme))
    teacher = make_teacher(model, known)
    if teacher.channels_last:
        opened.module.to(memory_format=torch.channels_last)
    settings, rng = AdaDFQSettings(), torch.Generator().manual_seed(0)
    count = 8 if known.large else 64
    player = GeneratorPlayer(teacher, settings, count, rng, torch.device("cpu"))
    images = player.sample()[0]
    if teacher.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), opened.phase(Phase.OBSERVE):
        opened.module(images)
    opened.set_ranges("minmax")
    for step in opened.steps():
        step.requires_grad_(True)
    yield of_generator(player)
    yield of_teacher(teacher, images)
    yield from of_quantizers(opened, images)
    mapping = get_default_qat_qconfig_mapping("x86")
    plain: Any = prepare_qat_fx(traceable(model, known.input_size).train(), mapping, (images[:2],))
    yield of_quantized(opened, plain, images)
    learner = QuantizedPlayer(opened, teacher, settings, Pace(1))  # before its first step: at a rate of zero
    yield of_update(learner)
    yield of_lesson(learner, plain, images, PIECE if known.large else None)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", default=["resnet20", "tf_efficientnet_lite0"], choices=rulers.NETWORKS
    )
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rulers.use_best_kernels()
    print(f"W{options.bits}A{options.bits}; {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    print()
    print("| network | part | plainly, ms | here, ms | times as fast | kept plainly, MiB | kept here, MiB |")
    print("|---|---|---|---|---|---|---|")
    for network in options.networks:
        with fork_rng(0):
            for part in parts(network, options.bits):
                here, plain = median(part.here), None if part.plain is None else median(part.plain)
                cells = [
                    network,
                    part.name,
                    "" if plain is None else f"{plain:.1f}",
                    f"{here:.1f}",
                    "" if plain is None else f"{plain / here:.2f}",
                    "" if part.plain is None else f"{kept(part.plain):.1f}",
                    f"{kept(part.here):.1f}",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
