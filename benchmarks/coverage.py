"""Which timm families go through the whole quantization path of a backend: the table docs/coverage.md.

Each family's smallest architecture, with random weights, in a process of its own: ``adadfq_plugin.prepare``,
``adadfq_plugin.calibrate`` on random images with three training steps, the toolkit's convert, and the converted model
against the fake-quantized one. Once as timm initialises it, and once settled (see networks.py), which is what is
measured.

    python benchmarks/coverage.py                 # all families; goes on where an earlier run has stopped
    python benchmarks/coverage.py resnet xcit     # these, again
    python benchmarks/coverage.py --backend pt2e  # the other toolkit
    python benchmarks/coverage.py --all           # every architecture, into benchmarks/coverage-all.{json,md}
"""

import argparse
import copy
import gc
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from architectures import (
    architectures,
    count_parameters,
    families,
    family_of,
    smallest_architecture,
    smallest_model,
)
from coverage_table import AGREES, BACKENDS, LEAST, MOST, SECONDS, TABLE, Row, shown, write_table
from networks import random_images, settle
from torch import Tensor, fx, nn

import adadfq_plugin
from adadfq_plugin import api
from adadfq_plugin.backends.pt2e import compiled
from adadfq_plugin.errors import AdaDFQError
from adadfq_plugin.fake_quantize import LearnedQuantizer
from adadfq_plugin.switches import switched
from adadfq_plugin.teacher import multiply_adds

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "coverage.json"
ALL_ROWS = ROOT / "benchmarks" / "coverage-all.json"
# random weights have no statistics to imitate: random images, and a few real steps of training
SETTINGS = {"samples": 16, "batch_size": 2, "range_samples": 16, "steps": 3}
QUICK = {"samples": 2, "batch_size": 2, "range_samples": 2, "steps": 1, "ranges": "minmax"}
BATCH = 16
"""Images of the comparison in a batch."""
COPIES = 14
"""Of the weights: the model, prepared, opened, P twice, gradients, Adam's two moments and more; 13 were not enough."""
NUDGE = 1e-6
"""Relative change of each step size that is no more than rounding in single precision."""


def run_one(row: Row) -> None:
    """Take the row's architecture through the path and write into the row how far it has come."""
    row |= {"traced": False, "passed": False}
    try:
        fill(row)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        ours = isinstance(error, AdaDFQError)
        row["reason"] = first[:300] if ours else f"in {row['stage']}: {type(error).__name__}: {first}"[:300]


def fill(row: Row) -> None:
    """Take the row's architecture through the path and write what comes out of it into the row."""
    row["stage"] = "create"
    model, size = smallest_model(row["model"])
    frozen = copy.deepcopy(model).requires_grad_(False)
    row |= {"input_size": list(size), "multiply_adds": multiply_adds(frozen, size)}
    if "as_initialised" not in row:
        row["as_initialised"] = finite(walk(row, model, size, QUICK)[1], torch.randn(2, *size))
        gc.collect()  # graphs are cycles, and the next round takes as much memory again
    settle(model, size)
    prepared, converted = walk(row, model, size, SETTINGS)
    row["stage"] = "run"
    with torch.no_grad():
        measured: nn.Module = converted
        if row["backend"] == "pt2e":
            row["eager_error"] = distance(logits(prepared, BATCH, size), logits(converted, BATCH, size))
            measured = by_inductor(row, converted, size)
        compare(row, prepared, measured, size)
    integer = api.backends().get(row["backend"]).integer_macs(converted, torch.zeros(2, *size))
    row["integer_share"] = integer / row["multiply_adds"]
    del row["stage"]


def walk(
    row: Row, model: nn.Module, size: tuple[int, int, int], settings: dict[str, Any]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The way itself: the calibrated model and what the toolkit's own convert makes of it."""
    from torch.ao.quantization.quantize_fx import convert_fx
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    start, seconds = time.monotonic(), row.setdefault("stages", {})
    row["stage"] = "prepare"
    scheme = {"engine": "x86"} if row["backend"] == "fx" else None
    prepared: Any = adadfq_plugin.prepare(model, size, scheme=scheme, backend=row["backend"])
    row |= {"stage": "calibrate", "traced": True}
    seconds["prepare"] = round(time.monotonic() - start, 1)
    adadfq_plugin.calibrate(prepared, method="random_images", settings=settings, input_size=size)
    row["stage"] = "convert"
    seconds["calibrate"] = round(time.monotonic() - start - seconds["prepare"], 1)
    if row["backend"] == "fx":
        converted = convert_fx(copy.deepcopy(prepared.eval()))
    else:
        converted = convert_pt2e(copy.deepcopy(prepared))
    seconds["convert"] = round(time.monotonic() - start - seconds["prepare"] - seconds["calibrate"], 1)
    return prepared, converted


def by_inductor(row: Row, converted: fx.GraphModule, size: tuple[int, int, int]) -> nn.Module:
    """What Inductor makes of a converted model; the model itself, and the reason in the row, where it fails."""
    network = compiled(converted)
    try:
        logits(network, BATCH, size)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        row["compile_error"] = f"{type(error).__name__}: {(lines or [''])[0]}"[:300]
        return converted
    row["compiled"] = True
    return network


@torch.no_grad()
def finite(model: nn.Module, images: Tensor) -> bool:
    """Whether the model gives numbers for the images."""
    return bool(torch.isfinite(first(model(images))).all())


def batches(count: int, size: tuple[int, int, int]) -> Iterator[Tensor]:
    """The same images every time."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(0, count, BATCH):
        yield random_images(BATCH, size, generator)


def logits(model: Callable[[Tensor], Any], count: int, size: tuple[int, int, int]) -> Tensor:
    """What the model says of the first ``count`` images."""
    return torch.cat([first(model(images)) for images in batches(count, size)])


def compare(row: Row, prepared: fx.GraphModule, converted: nn.Module, size: tuple[int, int, int]) -> None:
    """Write the distances between the fake-quantized, the float and the converted model's logits into the row.

    Where the first and the last don't agree, the fake-quantized model is run once more with every step size changed by
    a millionth. Answers that this changes are no more stable than single precision is.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    start = time.monotonic()
    for images in batches(MOST, size):
        pairs.append((first(prepared(images)), first(converted(images))))
        if len(pairs) * BATCH >= LEAST and time.monotonic() - start > SECONDS:
            break
    expected, actual = (torch.cat(each) for each in zip(*pairs, strict=True))
    row |= {"passed": bool(torch.isfinite(torch.cat([expected, actual])).all()), "images": len(expected)}
    if not row["passed"]:
        raise ArithmeticError("logits that are not finite")
    row["agreement"] = agreement(expected, actual)
    row["relative_error"] = distance(expected, actual)
    quantizers = [each for each in prepared.modules() if hasattr(each, "fake_quant_enabled")]
    activations = [each for each in quantizers if not getattr(each, "per_channel", False)]
    with switched(quantizers, (), observe=False, quantize=False):
        unquantized = logits(prepared, LEAST, size)
    with switched(activations, (), observe=False, quantize=False):
        row["weight_error"] = distance(unquantized[:BATCH], logits(prepared, BATCH, size))
    row["quantization_error"] = distance(unquantized, expected[:LEAST])
    row["float_agreement"] = agreement(unquantized, expected[:LEAST])
    if row["agreement"] >= AGREES:
        return
    generator = torch.Generator().manual_seed(3)
    nudged = copy.deepcopy(prepared)
    for module in nudged.modules():
        if isinstance(module, LearnedQuantizer):
            module.log_scale.add_(NUDGE * torch.randn(module.log_scale.shape, generator=generator))
    control = logits(nudged, LEAST, size)
    row["nudged_agreement"] = agreement(expected[:LEAST], control)
    row["nudged_error"] = distance(expected[:LEAST], control)


def agreement(expected: Tensor, actual: Tensor) -> float:
    """Share of the images of which both say the same."""
    return float((expected.argmax(-1) == actual.argmax(-1)).float().mean())


def distance(expected: Tensor, actual: Tensor) -> float:
    """Relative to what the expected logits vary by from image to image."""
    return float((actual - expected).norm() / (expected - expected.mean(0)).norm())


def first(output: Any) -> Tensor:
    """Return the logits of a model that may return several."""
    return output if isinstance(output, Tensor) else first(next(iter(output)))


def run_in_process(row: Row, connection: Connection, gibibytes: int) -> None:
    """Complete the row of an architecture and send it through the connection."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (gibibytes << 30, gibibytes << 30))
    torch.set_num_threads(1)
    try:
        if "model" not in row:
            row["model"], row["parameters"] = smallest_architecture(row["family"])
        elif "parameters" not in row:
            row["parameters"] = count_parameters(row["model"])
        if COPIES * 4 * row["parameters"] > gibibytes << 30:
            row |= {"traced": False, "passed": False, "reason": too_large(row["parameters"], gibibytes)}
        else:
            run_one(row)
    except Exception as error:
        row |= {"passed": False, "reason": f"{type(error).__name__}: {error}"[:300]}
    connection.send(row)


def too_large(parameters: int, gibibytes: int) -> str:
    """Why a model is not tried."""
    needed = COPIES * 4 * parameters / 2**30
    size = f"{parameters / 1e6:.0f} million parameters"
    return f"not tried: {size} take {needed:.0f} GiB to train, the limit is {gibibytes}"


def run_limited(known: Row, seconds: int, gibibytes: int) -> Row:
    """Return a row completed from what is known of it; a process that takes too long or dies has one too."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_in_process, args=(known, sender, gibibytes))
    start = time.monotonic()
    process.start()
    sender.close()
    row = known | {"passed": False, "reason": f"not finished in {seconds} s"}
    try:
        if receiver.poll(seconds):
            row = receiver.recv()
    except EOFError:
        row["reason"] = f"the process has died (limit of {gibibytes} GiB)"
    finally:
        process.kill()
        process.join()
    return row | {"seconds": round(time.monotonic() - start)}


def main() -> None:
    """Run what has no complete row yet, or what is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="families (or architectures) to run again; default: all without a row"
    )
    parser.add_argument(
        "--all", action="store_true", help="every architecture instead of one for each family"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--seconds", type=int, default=300, help="time limit for each (default: 300)")
    parser.add_argument(
        "--gibibytes", type=int, default=10, help="memory limit for each process (default: 10)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="fx", help="toolkit (default: fx)")
    options = parser.parse_args()
    store, table = (ALL_ROWS, ALL_ROWS.with_suffix(".md")) if options.all else (ROWS, TABLE)
    rows: dict[str, Row] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}

    def row_of(name: str, backend: str) -> Row:
        return rows.get(f"{name} {backend}", {})

    def start(name: str) -> Row:
        row: Row = {"backend": options.backend}
        if options.all:
            row |= {"model": name, "family": family_of(name)}
        else:
            row["family"] = name
        # the search for the smallest architecture is slow, and its outcome does not change
        for known in (row_of(name, each) for each in BACKENDS):
            row |= {key: known[key] for key in ("model", "parameters") if key in known}
        if name not in options.names and row_of(name, options.backend).get("as_initialised"):
            row["as_initialised"] = True
        return row

    def cost(name: str) -> int:
        return max(int(row_of(name, each).get("multiply_adds", 0)) for each in BACKENDS)

    def is_done(row: Row) -> bool:
        return "images" in row or row.get("passed") is False

    names = architectures() if options.all else families()
    todo = options.names or [name for name in names if not is_done(row_of(name, options.backend))]
    # what takes long to import is imported once, not for each process
    packages = ["timm", "torch._dynamo", "adadfq_plugin.backends.fx", "adadfq_plugin.backends.pt2e"]
    multiprocessing.set_forkserver_preload(["__main__", *packages])
    with ThreadPoolExecutor(options.jobs) as pool:
        limits = options.seconds, options.gibibytes
        waiting = {pool.submit(run_limited, start(name), *limits): name for name in sorted(todo, key=cost)}
        for future in as_completed(waiting):
            row = future.result()
            rows[f"{waiting[future]} {options.backend}"] = row
            store.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            print(
                f"{row['family']:28} {row.get('model', ''):36} {row['seconds']:4} s  {shown(row)}", flush=True
            )
    write_table(rows, table)


if __name__ == "__main__":
    main()
