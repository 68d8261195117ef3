"""Accuracy of quantized networks: one process a cell, resumable, one writer of tables.

    python benchmarks/accuracy.py --schemes w4a4 --methods adadfq bn_stats mse-synthetic real --seeds 0 1 2
    python benchmarks/accuracy.py --schemes w4a4 --set feature_weight=0                 # an ablation
    python benchmarks/accuracy.py --networks vit_cifar10 --backends fx pt2e --json other.json
    python benchmarks/accuracy.py --merge other.json                 # into --json, and into docs/results.md
    python benchmarks/accuracy.py --protocol papers --methods paper --set steps=4000
    python benchmarks/accuracy.py --merge --plot docs/accuracy_time.svg

Networks and labelled images come from the folder of ADADFQ_ASSETS (default ../shared/assets). Protocol `deployable`:
BatchNorm folded, symmetric per-channel weights, affine per-tensor activations wherever the integer kernel needs one,
input and logits at 8 bits, every layer at the stated bits; top-1 of what `convert_fx` or `convert_pt2e` returns (the
latter run eagerly, which computes in float what it has quantized). Protocol `papers`: see papers.py. Tables are written
by runs with the default --json alone, so that others may run beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import cells
import papers
import rulers
import tables
import torch
from torch.fx import GraphModule

import adadfq_plugin
from adadfq_plugin import api
from adadfq_plugin.config import Settings
from adadfq_plugin.errors import AdaDFQError
from adadfq_plugin.functional import kl_divergence_loss, top1_accuracy, top1_agreement

RECIPES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    # name: registered method, its preset, changes; any registered method goes by its own name as well
    "minmax-noise": ("noise", None, {"steps": 0, "rounding": "nearest", "ranges": "minmax"}),
    "mse-noise": ("noise", None, {"steps": 0, "rounding": "nearest"}),
    "mse-synthetic": ("adadfq", None, {"steps": 0, "rounding": "nearest"}),
    "mse-real": ("real_images", None, {"steps": 0, "rounding": "nearest"}),
    "rounded-synthetic": ("adadfq", None, {"steps": 0}),
    "paper": ("adadfq", "paper_cifar", {}),
    "real": ("real_images", None, {}),
}


@dataclass(frozen=True)
class Cell:
    """What one process runs."""

    network: str
    scheme: str
    method: str
    backend: str
    protocol: str
    minutes: float | None
    settings: dict[str, Any]
    device: str
    seed: int

    @property
    def widths(self) -> adadfq_plugin.Scheme:
        found = re.fullmatch(r"w([2-8])a([2-8])", self.scheme)
        if found is None:
            raise SystemExit(f"{self.scheme!r} is no scheme like w4a8, of 2 to 8 bits")
        return adadfq_plugin.Scheme(weight_bits=int(found[1]), activation_bits=int(found[2]))

    @property
    def on_real_images(self) -> bool:
        return self.recipe[0] == "real_images"

    @property
    def recipe(self) -> tuple[str, Settings]:
        """The registered method and its settings, validated."""
        method, preset, values = RECIPES.get(self.method, (self.method, None, {}))
        where = {"network": self.network} if method == "real_images" else {}
        changes = {**values, **where, **self.settings}
        return method, api.method_settings(api.methods().get(method), changes, preset)

    def check(self) -> None:
        """Refuses now what can't be run."""
        _, (_, settings) = self.widths, self.recipe
        if self.minutes is not None and settings.steps is not None:
            raise SystemExit(f"{self.method}: a time limit doesn't change steps that are set; --set steps=N")
        if self.method == "real" and self.network not in rulers.CIFAR:
            raise SystemExit(f"{self.network}: no real images to train on; all are needed for measuring")
        if self.protocol == "papers" and (self.network not in papers.NETWORKS or self.backend != "fx"):
            raise SystemExit(f"protocol 'papers' is for {', '.join(papers.NETWORKS)} on fx alone")


def run(cell: Cell) -> tables.Row:
    """Prepare, calibrate, convert; then the figures."""
    from torch.ao.quantization.quantize_fx import convert_fx

    rulers.use_best_kernels()
    model, facts = rulers.load(cell.network)
    method, settings = cell.recipe
    start = time.monotonic()
    if cell.protocol == "papers":
        prepared = papers.prepare(model, facts["input_size"], cell.widths)
    else:
        prepared = adadfq_plugin.prepare(model, facts["input_size"], scheme=cell.widths, backend=cell.backend)
    phases = {"prepare": time.monotonic() - start}
    result = adadfq_plugin.calibrate(
        prepared,
        method=method,
        settings=settings,
        minutes=cell.minutes,
        seed=cell.seed,
        device=cell.device,
        **facts,
    )
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    images, labels = rulers.images(cell.network)
    if cell.on_real_images:
        unseen = ~rulers.seen(cell.network, len(images))
        images, labels = images[unseen], labels[unseen]
    if cell.backend == "fx":  # an exported graph knows no modes
        prepared.eval()
    of_float, fake = (rulers.logits(network, images, cell.device) for network in (model, prepared))
    row: tables.Row = {
        "cell": asdict(cell),
        "images": len(images),
        "float": top1_accuracy(of_float, labels),
        "fake": top1_accuracy(fake, labels),
        "divergence": kl_divergence_loss(of_float, fake, temperature=1.0).item(),
        "converted": None,
        "seconds": seconds,
        "phases": {**phases, **result.seconds},
        "peak_mib": peak,
        "notes": result.notes,
        "vnni": bool(torch.cpu._is_vnni_supported()),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cell.device == "cuda" else cell.device,
        "torch": torch.__version__,
        "commit": commit(),
    }
    measured = fake
    if cell.protocol == "deployable":
        if cell.backend == "fx":
            measured = rulers.logits(convert_fx(cast(GraphModule, prepared)), images)
        else:
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

            measured = rulers.logits(convert_pt2e(prepared), images)
        row["converted"] = top1_accuracy(measured, labels)
        row["agreement"] = top1_agreement(fake, measured)
        row["logit_error"] = ((fake - measured).abs().mean() / fake.std()).item()
    if cell.network in rulers.CIFAR:
        row["first"] = top1_accuracy(measured[: rulers.FIRST], labels[: rulers.FIRST])
    return row


def commit() -> str:
    """The commit that is measured, with a plus where the code has been changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=tables.HERE, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "../adadfq_plugin", "*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as in JSON, or a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def options() -> argparse.Namespace:
    parser = cells.parser(__doc__, tables.ROWS)
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--networks", **several, default=["resnet20"], choices=rulers.NETWORKS)
    parser.add_argument("--schemes", **several, default=["w8a8", "w6a6", "w4a8", "w4a4", "w3a3"])
    parser.add_argument("--backends", **several, default=["fx"], choices=["fx", "pt2e"])
    parser.add_argument(
        "--methods", **several, default=["adadfq"], help=f"registered, or {', '.join(RECIPES)}"
    )
    parser.add_argument("--protocol", default="deployable", choices=["deployable", "papers"])
    parser.add_argument("--set", **several, default=[], type=setting, metavar="NAME=VALUE", help="settings")
    parser.add_argument("--minutes", type=float, default=None, help="time limit of each calibration")
    parser.add_argument("--seeds", **several, type=int, default=[0])
    parser.add_argument("--again", action="store_true", help="run cells that have a row already")
    parser.add_argument("--plot", type=Path, help="draw top-1 against time into this file")
    return parser.parse_args()


def _figures(row: tables.Row) -> str:
    return f"{tables.accuracy(row):.2f} {row['seconds']:.0f} s"


def main() -> None:
    """Runs the cells that are missing, then writes tables and plot."""
    chosen = options()
    if chosen.cell:
        warnings.simplefilter("ignore")
        print(json.dumps(run(Cell(**json.loads(chosen.cell)))))
        return
    failed = None
    if chosen.merge is not None:
        tables.save(tables.read(chosen.json, *chosen.merge), chosen.json)
    else:
        axes = chosen.networks, chosen.schemes, chosen.backends, chosen.seeds, chosen.methods
        same = chosen.protocol, chosen.minutes, dict(chosen.set), chosen.device
        wanted = [
            Cell(network, scheme, method, backend, *same, seed)
            for network, scheme, backend, seed, method in product(*axes)
        ]
        for cell in wanted:
            try:
                cell.check()
            except AdaDFQError as error:
                raise SystemExit(f"{cell.method}: {error}") from None
        failed = cells.run_missing(wanted, chosen.json, _figures, again=chosen.again)
    rows = tables.read(chosen.json)
    if chosen.json.resolve() == tables.ROWS:
        tables.between(tables.MARKS, tables.tables(rows))
    else:
        print(tables.tables(rows))
    if chosen.plot and not tables.plot(rows, chosen.plot):
        print("no plot: nothing was run with several --minutes")
    if failed:
        raise SystemExit(failed)


if __name__ == "__main__":
    main()
