"""What a converted network gains in time: float and converted, eager and compiled, side by side in one run.

    python benchmarks/speed.py --backends fx pt2e

Each backend quantizes the network without data, at the method's default settings; then the variants take turns, image
by image and batch by batch, in one process. The accuracy of each is measured on the rulers' images, where they are.
"""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Mapping
from typing import Any

import rulers
import torch
from torch import nn

import adadfq_plugin
from adadfq_plugin.backends.pt2e import compiled
from adadfq_plugin.functional import top1_accuracy
from adadfq_plugin.report.facts import measure_latency


def variants(
    model: nn.Module, facts: dict[str, Any], backends: list[str], **arguments: Any
) -> dict[str, nn.Module]:
    """The float network and what each backend makes of it."""
    rulers.use_best_kernels()
    made: dict[str, nn.Module] = {"float, eager": model, "float, compiled": compiled(model)}
    for backend in backends:
        result = adadfq_plugin.quantize(model, backend=backend, **arguments, **facts)
        assert result.quantized is not None
        made[f"{backend}, eager"] = result.quantized
        if backend == "pt2e":
            made[f"{backend}, compiled"] = compiled(result.quantized)
        else:
            example = torch.zeros(1, *facts["input_size"])
            made[f"{backend}, TorchScript"] = torch.jit.freeze(
                torch.jit.trace(result.quantized.eval(), example)
            )
    return made


def top1(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int) -> float:
    """Share of images whose largest logit is at the label; batches are filled up, for each size is compiled anew."""
    filled = torch.cat([images, images[: -len(images) % batch]])
    with torch.no_grad():
        logits = torch.cat([network(each) for each in filled.split(batch)])[: len(labels)]
    return top1_accuracy(logits, labels)


def main() -> None:
    """Quantizes, measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="tf_efficientnet_lite0", choices=rulers.NETWORKS)
    parser.add_argument("--backends", nargs="+", default=["fx", "pt2e"], choices=["fx", "pt2e"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=None, help="time limit of each calibration")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    scheme = adadfq_plugin.Scheme(weight_bits=options.bits, activation_bits=options.bits)
    model, facts = rulers.load(options.network)
    run = {"scheme": scheme, "seed": options.seed, "minutes": options.minutes}
    made = variants(model, facts, options.backends, **run)
    accuracy: dict[str, str] = {}
    if rulers.ASSETS.is_dir():
        images, labels = rulers.images(options.network)
        accuracy = {
            name: f"{100 * top1(each, images, labels, max(options.batches)):.2f}"
            for name, each in made.items()
        }
    columns: dict[int, Mapping[str, float]] = {}
    for batch in options.batches:
        example = torch.randn(batch, *facts["input_size"], generator=torch.Generator().manual_seed(0))
        columns[batch] = measure_latency(made, example, seconds=60.0).milliseconds
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    machine = f"torch {torch.__version__}, {platform.machine()}, VNNI {torch.cpu._is_vnni_supported()}"
    print(f"{options.network}, W{options.bits}A{options.bits}, seed {options.seed}; {threads}; {machine}")
    print()
    heads = [f"ms an image, batch {batch} | against float, eager" for batch in options.batches]
    print("| variant | top-1 | " + " | ".join(heads) + " |")
    print("|---|---|" + "---|---|" * len(heads))
    for name in made:
        cells = [accuracy.get(name, "")]
        for batch, times in columns.items():
            cells += [f"{times[name] / batch:.2f}", f"{times['float, eager'] / times[name]:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
