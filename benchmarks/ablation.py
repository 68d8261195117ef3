"""What each ingredient of the defaults brings: one row an ingredient that is taken out, one process a cell, resumable.

    python benchmarks/ablation.py --schemes w4a4 w3a3 --seeds 0 1 2                 # all ingredients
    python benchmarks/ablation.py --without game disagreement --seeds 0             # some
    python benchmarks/ablation.py --merge other.json                                # into --json, and docs/results.md

Ingredients of Q's training are taken out on one pool of images a seed, which is made once and kept in --pools: then
nothing else differs. Ingredients of the images are taken out of pools of their own. Neither plays the game, whose
parts have rows and a base of their own: there the images of the pool and those that join it come from one generator.
Deployable protocol, converted by `fx`; see accuracy.py for the assets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, cast
from unittest import mock

import cells
import rulers
import tables
import torch
from accuracy import commit
from torch.fx import GraphModule

import adadfq_plugin
from adadfq_plugin.config import AdaDFQSettings, Scheme
from adadfq_plugin.contracts import Outcome, Task
from adadfq_plugin.functional import kl_divergence_loss, top1_accuracy
from adadfq_plugin.game import augment, generator
from adadfq_plugin.game.run import Run
from adadfq_plugin.methods.adadfq import AdaDFQ

ROWS = tables.HERE / "ablation.json"
MARKS = "<!-- ablation -->\n", "<!-- end of ablation -->"
NO_BOUNDARIES = {"alpha_ds": 0.0, "alpha_as": 0.0, "lambda_l": 0.0, "lambda_u": 1.0}
COLUMNS = (
    "without | top-1, mean (each) | loss of top-1, mean (each) | divergence, mean | more of it | seconds"
)


@dataclass(frozen=True)
class Ingredient:
    """One thing that the defaults have.

    Args:
        group: what it is a part of: ``training`` of Q, the ``images``, or the ``game``.
        what: in words.
        settings: changes that take it out.
        views: whether Q sees views of its images.
        falls: spectra that are left to be refined in; all where it is empty.
        parts: whether P sees parts of the images that are refined.
    """

    group: str
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    views: bool = True
    falls: tuple[float, ...] = ()
    parts: bool = True


INGREDIENTS: dict[str, Ingredient] = {
    "training": Ingredient("training", "nothing (a fixed pool, no game)"),
    "features": Ingredient("training", "activations in Q's loss", {"feature_weight": 0.0}),
    "rounding": Ingredient("training", "rounding that makes up for errors", {"rounding": "nearest"}),
    "steady means": Ingredient(
        "training", "biases that follow their weights' rounding", {"steady_means": False}
    ),
    "ranges": Ingredient(
        "training", "ranges of least squared error (instead: min/max)", {"ranges": "minmax"}
    ),
    "step sizes": Ingredient("training", "learned step sizes", {"learn_step_sizes": False}),
    "mixup": Ingredient("training", "mixtures of two images", {"mixup": 0.0}),
    "views": Ingredient("training", "views of Q's images", views=False),
    "temperature": Ingredient("training", "a temperature of 4 (instead: 1)", {"temperature": 1.0}),
    "kl": Ingredient("training", "the divergence (instead: the paper's loss)", {"loss": "information"}),
    "keep best": Ingredient("training", "taking back what did harm", {"keep_best": False}),
    "refining": Ingredient("images", "refining of images", {"refine_steps": 0}),
    "spectrum": Ingredient("images", "moves in photographs' spectrum", falls=(0.0,)),
    "pixels": Ingredient("images", "moves of single pixels", falls=(1.0,)),
    "parts": Ingredient("images", "views while refining", parts=False),
    "game": Ingredient("game", "nothing (all of the defaults)"),
    "boundaries": Ingredient("game", "both boundaries (G follows the prior alone)", NO_BOUNDARIES),
    "balance": Ingredient("game", "the balance", {"beta": 0.0}),
    "margin": Ingredient("game", "the margin", {"lambda_l": 0.0, "lambda_u": 1.0}),
    "disagreement": Ingredient("game", "disagreement samples", {"alpha_ds": 0.0}),
    "agreement": Ingredient("game", "agreement samples", {"alpha_as": 0.0}),
}
"""Its name is what the command line takes out; the first of a group is that group's base."""


@dataclass(frozen=True)
class Cell:
    """What one process runs."""

    network: str
    scheme: str
    without: str
    samples: int
    steps: int
    device: str
    seed: int

    @property
    def ingredient(self) -> Ingredient:
        return INGREDIENTS[self.without]

    @property
    def pool(self) -> str:
        """What the pool's file is named by, beside its making: one for all but those that change its images."""
        own = self.without.replace(" ", "_") if self.ingredient.group == "images" else "all"
        return f"{self.network}-{self.samples}-{own}-{self.seed}"


@contextmanager
def method(cell: Cell, pools: Path) -> Iterator[None]:
    """AdaDFQ as the cell wants it, for a while; it begins with a pool that was made before, or makes and keeps it."""
    ingredient = cell.ingredient

    def calibrate(self: AdaDFQ, task: Task) -> Outcome:
        run = Run(task, views=ingredient.views)
        player = run.player()
        making = f"{run.plan.warmup}-{run.plan.refine}-{task.device.type}-{commit()}"
        file = pools / f"{cell.pool}-{making}.pt"
        if file.exists():
            made = torch.load(file, map_location=task.device)
            run.pool.add(made["images"], made["labels"])
            run.held_out = made["held_out"]
            player.generator.load_state_dict(made["generator"])
        else:
            run.warm_up(player)
            run.make_samples(player)
            file.parent.mkdir(parents=True, exist_ok=True)
            made = {"images": run.pool.images, "labels": run.pool.labels, "held_out": run.held_out}
            torch.save({**made, "generator": player.generator.state_dict()}, file)
        run.rng.manual_seed(task.seed)  # the same draws whether the pool is new or not
        if not task.settings.keep_best:
            run.held_out = torch.empty(0)
        run.observe()
        run.play(player if ingredient.group == "game" else None)
        return run.outcome(self.name)

    view = augment if ingredient.parts else lambda images, rng: images
    with (
        mock.patch.object(generator, "FALLS", ingredient.falls or generator.FALLS),
        mock.patch.object(generator, "augment", view),
        mock.patch.object(AdaDFQ, "calibrate", calibrate),
    ):
        yield


def run(cell: Cell, pools: Path) -> tables.Row:
    """Prepare, calibrate, convert; then the figures."""
    from torch.ao.quantization.quantize_fx import convert_fx

    rulers.use_best_kernels()
    model, facts = rulers.load(cell.network)
    scheme = Scheme(weight_bits=int(cell.scheme[1]), activation_bits=int(cell.scheme[3]))
    prepared = adadfq_plugin.prepare(model, facts["input_size"], scheme=scheme)
    values = {"samples": cell.samples, "steps": cell.steps, **cell.ingredient.settings}
    start = time.monotonic()
    with method(cell, pools):
        result = adadfq_plugin.calibrate(
            prepared,
            method="adadfq",
            settings=AdaDFQSettings(**values),
            seed=cell.seed,
            device=cell.device,
            **facts,
        )
    seconds = time.monotonic() - start
    images, labels = rulers.images(cell.network)
    prepared.eval()
    z_p, z_q = (rulers.logits(network, images, cell.device) for network in (model, prepared))
    z_c = rulers.logits(convert_fx(cast(GraphModule, prepared)), images)
    return {
        "cell": asdict(cell),
        "float": top1_accuracy(z_p, labels),
        "converted": top1_accuracy(z_c, labels),
        "divergence": kl_divergence_loss(z_p, z_q, temperature=1.0).item(),
        "seconds": seconds,
        "notes": result.notes,
        "commit": commit(),
    }


def write(rows: Mapping[str, tables.Row]) -> str:
    """A table a network, width and group: each ingredient's loss against the base on the same seeds."""
    parts = []
    for table in sorted({_table(row) for row in rows.values()}):
        network, scheme, samples, steps, device = table
        for group in dict.fromkeys(each.group for each in INGREDIENTS.values()):
            whats = {name: each.what for name, each in INGREDIENTS.items() if each.group == group}
            base = "game" if group == "game" else "training"
            whats = {base: INGREDIENTS[base].what, **whats}
            if group == "game":
                whats["training"] = "the game (a fixed pool)"
            found = {
                name: {
                    row["cell"]["seed"]: row
                    for row in rows.values()
                    if _table(row) == table and row["cell"]["without"] == name
                }
                for name in whats
            }
            lines = [_line(whats[name], of, found[base]) for name, of in found.items() if of]
            if len(lines) < 2 or not found[base]:
                continue
            one = next(row for of in found.values() for row in of.values())
            about = f"{samples} images, {steps} steps of Q, {device}"
            parts.append(
                f"**{network}, {scheme.upper()}, {group}** ({about}; float {100 * one['float']:.2f})\n\n"
                f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}\n" + "\n".join(lines)
            )
    return "\n\n".join(parts)


def _table(row: tables.Row) -> tuple[str, str, int, int, str]:
    """What the rows of a table have in common: others would be no base for them."""
    cell = Cell(**row["cell"])
    return cell.network, cell.scheme, cell.samples, cell.steps, cell.device


def _line(what: str, of: Mapping[int, tables.Row], base: Mapping[int, tables.Row]) -> str:
    def mean(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f}"

    top1 = [100 * row["converted"] for _, row in sorted(of.items())]
    pairs = [(base[seed], row) for seed, row in sorted(of.items()) if seed in base]
    lost = [100 * (one["converted"] - other["converted"]) for one, other in pairs]
    farther = [other["divergence"] / one["divergence"] - 1 for one, other in pairs]
    is_base = of is base or not pairs
    cells = [
        what,
        f"{statistics.mean(top1):.2f} ({', '.join(f'{each:.2f}' for each in top1)})",
        "" if is_base else f"{statistics.mean(lost):.2f} ({', '.join(f'{each:.2f}' for each in lost)})",
        mean([row["divergence"] for row in of.values()]),
        "" if is_base else f"{100 * statistics.mean(farther):+.0f} %",
        f"{statistics.mean(row['seconds'] for row in of.values()):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def options() -> argparse.Namespace:
    parser = cells.parser(__doc__, ROWS)
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--networks", **several, default=["resnet20"], choices=rulers.CIFAR[:2])
    parser.add_argument("--schemes", **several, default=["w4a4", "w3a3"])
    parser.add_argument("--without", **several, default=list(INGREDIENTS), choices=INGREDIENTS)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", **several, type=int, default=[0])
    parser.add_argument("--pools", type=Path, default=tables.HERE.parent / "build" / "pools")
    return parser.parse_args()


def _figures(row: tables.Row) -> str:
    return f"{100 * row['converted']:.2f} {row['divergence']:.4f} {row['seconds']:.0f} s"


def main() -> None:
    """Runs the cells that are missing, then writes the tables."""
    chosen = options()
    if chosen.cell:
        warnings.simplefilter("ignore")
        print(json.dumps(run(Cell(**json.loads(chosen.cell)), chosen.pools)))
        return
    failed = None
    if chosen.merge is not None:
        tables.save(tables.read(chosen.json, *chosen.merge), chosen.json)
    else:
        axes = chosen.seeds, chosen.without, chosen.networks, chosen.schemes
        wanted = [
            Cell(network, scheme, without, chosen.samples, chosen.steps, chosen.device, seed)
            for seed, without, network, scheme in product(*axes)
        ]
        failed = cells.run_missing(wanted, chosen.json, _figures, options=["--pools", str(chosen.pools)])
    text = write(tables.read(chosen.json))
    if chosen.json.resolve() == ROWS:
        tables.between(MARKS, text)
    else:
        print(text)
    if failed:
        raise SystemExit(failed)


if __name__ == "__main__":
    main()
