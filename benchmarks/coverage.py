"""Which timm families go through the whole quantization path of a backend: the table docs/coverage.md.

Each family's smallest architecture, randomly initialised, in a process of its own: ``adadfq_plugin.prepare``,
``adadfq_plugin.calibrate`` on noise with three training steps, the toolkit's convert, and the converted model against
the fake-quantized one.

    python benchmarks/coverage.py                 # all families; goes on where an earlier run has stopped
    python benchmarks/coverage.py resnet xcit     # these, again
    python benchmarks/coverage.py --backend pt2e  # the other toolkit
"""

import argparse
import copy
import json
import multiprocessing
import operator
import resource
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import disable_fake_quant
from torch.ao.quantization.quantize_fx import convert_fx
from torch.utils.flop_counter import FlopCounterMode

import adadfq_plugin
from adadfq_plugin import zoo
from adadfq_plugin.backends.fx.traceable import INPUT_SIZE, traceable
from adadfq_plugin.errors import UntraceableError

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "coverage.json"
TABLE = ROOT / "docs" / "coverage.md"
IMAGES = 8
# random weights have no statistics to imitate: noise, and a few real steps of training
SETTINGS = {"samples": IMAGES, "batch_size": 4, "range_samples": IMAGES, "steps": 3}
BACKENDS = ("fx", "pt2e")
Row = dict[str, Any]


def run_one(name: str, backend: str) -> Row:
    """Take one architecture through the path and return its row of the table, however far it has come."""
    row: Row = {"model": name, "backend": backend, "traced": False, "passed": False}
    try:
        fill(row)
    except UntraceableError as error:
        row["reason"] = str(error)[:300]
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]
    return row


def fill(row: Row) -> None:
    """Take the row's architecture through the path and write what comes out of it into the row."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(row["model"], pretrained=False)
    if row["backend"] == "pt2e":
        fill_pt2e(row, model)
        return
    traced = trace_smallest(model)
    size = traced.meta[INPUT_SIZE]
    row |= {"traced": True, "input_size": list(size), "multiply_adds": count_multiply_adds(traced, size)}
    images = torch.randn(IMAGES, *size)
    prepared = adadfq_plugin.prepare(model, size, scheme={"engine": "x86"})
    adadfq_plugin.calibrate(prepared, method="noise", settings=SETTINGS, input_size=size)
    prepared = prepared.eval()
    assert isinstance(prepared, fx.GraphModule)
    with torch.no_grad():
        expected = first(prepared(images))
        unquantized = first(copy.deepcopy(prepared).apply(disable_fake_quant)(images))
        converted = convert_fx(copy.deepcopy(prepared))
        actual = first(converted(images))
    row["integer_share"] = sum(integer_multiply_adds(traced, converted, size).values()) / row["multiply_adds"]
    compare(row, expected, unquantized, actual)


def fill_pt2e(row: Row, model: nn.Module) -> None:
    """The same through torchao; integer is what stands between its dequantize calls and can be lowered."""
    from torchao.quantization.pt2e import disable_fake_quant as disable
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    size = smallest_size(model)
    row |= {"input_size": list(size), "multiply_adds": count_multiply_adds(model, size)}
    images = torch.randn(IMAGES, *size)
    prepared = adadfq_plugin.prepare(model, size, backend="pt2e")
    row["traced"] = True
    adadfq_plugin.calibrate(prepared, method="noise", settings=SETTINGS, input_size=size)
    with torch.no_grad():
        expected = first(prepared(images))
        unquantized = first(copy.deepcopy(prepared).apply(disable)(images))
        converted = convert_pt2e(copy.deepcopy(prepared))
        actual = first(converted(images))
    row["integer_share"] = dequantized_multiply_adds(converted, images[:2]) / row["multiply_adds"]
    compare(row, expected, unquantized, actual)


def compare(row: Row, expected: Tensor, unquantized: Tensor, actual: Tensor) -> None:
    """Write the distances between the fake-quantized, the float and the converted model's logits into the row."""
    row["agreement"] = float((expected.argmax(-1) == actual.argmax(-1)).float().mean())
    row["relative_error"] = float((actual - expected).norm() / expected.norm())
    row["quantization_error"] = float((expected - unquantized).norm() / unquantized.norm())
    row["passed"] = bool(torch.isfinite(actual).all())


def trace_smallest(model: nn.Module) -> fx.GraphModule:
    """Rewrite the model for the smallest input size that it runs with."""
    return traceable(model, smallest_size(model))


def smallest_size(model: nn.Module) -> tuple[int, int, int]:
    """The smallest input size that the model runs with."""
    for size in zoo.candidate_sizes(model):
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(2, *size))
        except Exception:  # too small for this architecture; the last size is the one that it is meant for
            continue
        return size
    raise RuntimeError("the model does not run with its own input size")


def first(output: Any) -> Tensor:
    """Return the logits of a model that may return several."""
    return output if isinstance(output, Tensor) else first(next(iter(output)))


def count_multiply_adds(model: nn.Module, size: tuple[int, ...]) -> int:
    """Return the multiply-adds of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(2, *size))
    return int(counter.get_total_flops() // 4)


def integer_multiply_adds(
    traced: fx.GraphModule, converted: nn.Module, size: tuple[int, ...]
) -> dict[str, int]:
    """Return the multiply-adds for one image of each convolution and linear layer that became an integer one."""
    integer = {n for n, m in converted.named_modules() if type(m).__module__.startswith("torch.ao.nn")}
    counts: dict[str, int] = {}
    handles = []
    for name, module in traced.named_modules():
        if name in integer and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):

            def count(module: Any, args: Any, output: Tensor, name: str = name) -> None:
                per_output = module.weight[0].numel()
                counts[name] = counts.get(name, 0) + per_output * output.numel() // 2

            handles.append(module.register_forward_hook(count))
    try:
        with torch.no_grad():
            traced.eval()(torch.zeros(2, *size))
    finally:
        for handle in handles:
            handle.remove()
    return counts


class Counted(fx.Interpreter):
    """Counts the multiply-adds of the layers and products of which both operands are dequantized."""

    total = 0

    def run_node(self, n: fx.Node) -> Any:
        operands = [self.origin(each) for each in n.args[:2] if isinstance(each, fx.Node)]
        if len(operands) < 2 or not all("dequantize" in str(each.target) for each in operands):
            return super().run_node(n)
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.total += int(counter.get_total_flops())
        return result

    @staticmethod
    def origin(node: fx.Node) -> fx.Node:
        """The tensor whose values these are, in another shape."""
        while str(node.target).split(".")[1:2] == ["transpose"] or node.target is operator.getitem:
            (node,) = node.all_input_nodes
        return node


def dequantized_multiply_adds(converted: fx.GraphModule, images: Tensor) -> int:
    """Return the multiply-adds for one image that integer kernels can do."""
    counted = Counted(converted)
    with torch.no_grad():
        counted.run(images)
    return counted.total // (2 * len(images))


def run_in_process(row: Row, connection: Connection, gibibytes: int) -> None:
    """Complete the row of a family and send it through the connection."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (gibibytes << 30, gibibytes << 30))
    torch.set_num_threads(1)
    try:
        if "model" not in row:
            row["model"], row["parameters"] = zoo.smallest_architecture(row["family"])
        row |= run_one(row["model"], row["backend"])
    except Exception as error:
        row |= {"passed": False, "reason": f"{type(error).__name__}: {error}"[:300]}
    connection.send(row)


def run_family(known: Row, seconds: int, gibibytes: int) -> Row:
    """Return a family's row from what is known of it; a process that takes too long or dies has one too."""
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


def write_table(rows: dict[str, Row]) -> None:
    """Write the Markdown table."""
    done = [row for row in rows.values() if "passed" in row]
    done.sort(key=lambda row: (row["family"], row["backend"]))
    families = {row["family"] for row in rows.values()}
    passed = {each: sum(row["passed"] for row in done if row["backend"] == each) for each in BACKENDS}
    run = {each: sum(row["backend"] == each for row in done) for each in BACKENDS}
    either = len({row["family"] for row in done if row["passed"]})
    lines = [
        "# timm families through quantization",
        "",
        f"Of {len(families)} families {either} go the whole way at W8A8 on at least one backend:",
        f"{passed['fx']} of {run['fx']} that were run on `fx`, {passed['pt2e']} of {run['pt2e']} on `pt2e`.",
        "The way: `adadfq_plugin.prepare`, `adadfq_plugin.calibrate` (noise, three training steps), `convert_fx` or",
        "`convert_pt2e`, and a run of the converted model. One architecture for each",
        "family, the one with the fewest parameters, randomly initialised. Integer: share of the multiply-adds of",
        "convolutions, linear layers and matrix products that integer modules do (`fx`), or whose operands are both",
        "dequantized, so that Inductor finds an integer kernel for them (`pt2e`). Agreement: top-1 of the converted",
        f"model against the fake-quantized one on {IMAGES} random images; converted: the relative error of its logits;",
        "quantized: that of the fake-quantized model's against the same model without quantization. Random weights",
        "amplify each rounding: where quantization changes the logits a lot, another order of roundings does so too.",
        "A head that is initialised with zeros gives logits of zero and errors of nan: its agreement says nothing.",
        "",
        "Written by `python benchmarks/coverage.py` and `python benchmarks/coverage.py --backend pt2e`.",
        "",
        "| family | backend | model | input | traced | integer | agreement | converted | quantized | refused because |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in done:
        side = "x".join(map(str, row["input_size"][1:])) if "input_size" in row else ""
        traced = "yes" if row.get("traced") else "no"
        columns = {
            "integer_share": ".0%",
            "agreement": ".0%",
            "relative_error": ".2f",
            "quantization_error": ".2f",
        }
        figures = [format(row[key], style) if key in row else "" for key, style in columns.items()]
        reason = " ".join(row.get("reason", "").split()).replace("|", "\\|")[:300]
        cells = [row["family"], row["backend"], row.get("model", ""), side, traced, *figures, reason]
        lines.append("| " + " | ".join(cells) + " |")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Run the families that have no row yet, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="families to run again; default: all without a row")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--seconds", type=int, default=300, help="time limit for each family (default: 300)")
    parser.add_argument(
        "--gibibytes", type=int, default=10, help="memory limit for each process (default: 10)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="fx", help="toolkit (default: fx)")
    options = parser.parse_args()
    rows: dict[str, Row] = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}

    def key(family: str) -> str:
        return f"{family} {options.backend}"

    todo = options.families or [name for name in zoo.families() if "passed" not in rows.get(key(name), {})]

    def run(family: str) -> Row:
        # The search for the smallest architecture is slow, and its outcome does not change.
        known = rows.get(f"{family} fx", {})
        kept = {name: known[name] for name in ("model", "parameters") if name in known}
        row = {"family": family, "backend": options.backend} | kept
        return run_family(row, options.seconds, options.gibibytes)

    # What takes long to import is imported once, not for each family.
    multiprocessing.set_forkserver_preload(["__main__", "timm", "torch._dynamo"])
    with ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed([pool.submit(run, family) for family in todo]):
            row = future.result()
            rows[key(row["family"])] = row
            ROWS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            write_table(rows)
            figures = {key: row[key] for key in ("agreement", "integer_share", "reason") if key in row}
            print(f"{row['family']:28} {row.get('model', ''):36} {row['seconds']:4} s  {figures}", flush=True)


if __name__ == "__main__":
    main()
