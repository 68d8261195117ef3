"""Accuracy of converted networks, by method, width and seed: one process a cell, resumable, one table.

    python benchmarks/accuracy.py --networks resnet20 --bits 4 --methods adadfq bn_stats noise --seeds 0 1 2

Networks and labelled images come from the folder of ``ADADFQ_ASSETS`` (default ../shared/assets); they are a
ruler and nothing is trained on them. Protocol: deployable (BatchNorm folded, symmetric per-channel weights,
affine per-tensor activations wherever the integer kernel needs one, input and logits at 8 bits, every layer at
the stated bits), accuracy of the model that ``convert_fx`` returns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ASSETS = Path(os.environ.get("ADADFQ_ASSETS", HERE.parent / ".." / "shared" / "assets")).resolve()
ROWS = HERE / "accuracy.json"
TABLE = HERE.parent / "docs" / "results.md"


def load_cifar(name: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """A CIFAR-10 network of the assets, its images and labels, and the facts of its normalisation."""
    import numpy as np
    import torch

    spec = importlib.util.spec_from_file_location("cifar_resnet", ASSETS / "cifar_resnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arrays = np.load(ASSETS / "cifar10_eval.npz")
    pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (module.MEAN, module.STD))
    facts = {"input_size": 32, "mean": module.MEAN, "std": module.STD}
    return module.load(name), (pixels - mean) / std, torch.from_numpy(arrays["labels"]), facts


def run_cell(network: str, bits: int, method: str, seed: int, minutes: float | None) -> dict[str, Any]:
    """The user's three lines, then the figures."""
    import torch
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    import adadfq_plugin

    model, images, labels, facts = load_cifar(network)

    def logits(net: Any) -> Any:
        with torch.no_grad():
            return torch.cat([net(images[start : start + 500]) for start in range(0, len(images), 500)])

    float_top1 = (logits(model).argmax(1) == labels).float().mean().item()
    scheme = adadfq_plugin.Scheme(weight_bits=bits, activation_bits=bits)
    start = time.monotonic()
    prepared = prepare_qat_fx(model.train(), adadfq_plugin.qconfig_mapping(scheme), (images[:2],))
    result = adadfq_plugin.calibrate(prepared, method=method, seed=seed, minutes=minutes, **facts)
    seconds = time.monotonic() - start
    fake = logits(prepared.eval())
    converted = logits(convert_fx(prepared))
    return {
        "float": float_top1,
        "fake": (fake.argmax(1) == labels).float().mean().item(),
        "converted": (converted.argmax(1) == labels).float().mean().item(),
        "agreement": (fake.argmax(1) == converted.argmax(1)).float().mean().item(),
        "logit_error": ((fake - converted).abs().mean() / fake.std()).item(),
        "seconds": seconds,
        "phases": result.seconds,
        "vnni": bool(torch.cpu._is_vnni_supported()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line a network, width and method: mean and spread over the seeds."""
    lines = [
        "| network | bits | method | seeds | float | converted, mean (each) | drop | agreement, least "
        "| logit error, largest | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keyed = sorted((tuple(json.loads(key)), row) for key, row in rows.items())
    for (network, bits, method, minutes), group in groupby(
        keyed, key=lambda each: (*each[0][:3], each[0][4])
    ):
        cells = [row for _, row in group]
        top1 = [100 * row["converted"] for row in cells]
        mean, reference = statistics.mean(top1), 100 * cells[0]["float"]
        limit = f" in {minutes:g} min" if minutes else ""
        each = ", ".join(f"{value:.2f}" for value in top1)
        lines.append(
            f"| {network} | W{bits}A{bits} | {method}{limit} | {len(cells)} | {reference:.2f} | {mean:.2f} ({each}) "
            f"| {reference - mean:.2f} | {100 * min(row['agreement'] for row in cells):.2f} % "
            f"| {max(row['logit_error'] for row in cells):.4f} "
            f"| {statistics.mean(row['seconds'] for row in cells):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the cells that are missing, then writes the table between its marks in docs/results.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 6, 5, 4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=["adadfq"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--again", action="store_true", help="run cells that have a row already")
    parser.add_argument("--cell", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        warnings.simplefilter("ignore")
        print(json.dumps(run_cell(*json.loads(arguments.cell))))
        return
    if not ASSETS.is_dir():
        raise SystemExit(f"no assets at {ASSETS}: set ADADFQ_ASSETS to their folder")
    rows: dict[str, Any] = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for network in arguments.networks:
        for bits in arguments.bits:
            for seed in arguments.seeds:
                for method in arguments.methods:
                    key = json.dumps([network, bits, method, seed, arguments.minutes])
                    if key in rows and not arguments.again:
                        continue
                    command = [sys.executable, __file__, "--cell", key]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    rows[key] = json.loads(done.stdout.splitlines()[-1])
                    print(
                        key,
                        f"{100 * rows[key]['converted']:.2f}",
                        f"{rows[key]['seconds']:.0f} s",
                        flush=True,
                    )
                    ROWS.write_text(json.dumps(rows, indent=1))
    before, _, rest = TABLE.read_text().partition("<!-- accuracy -->\n")
    _, _, after = rest.partition("<!-- end -->")
    TABLE.write_text(f"{before}<!-- accuracy -->\n{table(rows)}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
