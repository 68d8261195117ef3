"""What the README and the docs tell people to type works."""

from __future__ import annotations

import functools
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adadfq_plugin
from adadfq_plugin.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(\S*/)?adadfq ", part)]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "quickstart.md"], ids=lambda page: page.name
)
@pytest.mark.parametrize("convert", ["convert_fx", "convert_pt2e"])
@pytest.mark.usefixtures("seeded")
def test_the_three_lines_leave_an_integer_network(
    page: Path, convert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {"torch": torch, "adadfq_plugin": adadfq_plugin}
    if convert == "convert_pt2e":
        pytest.importorskip("torchao", reason="backend pt2e needs torchao")
        from adadfq_plugin.backends.pt2e import SchemeQuantizer

        names["quantizer"] = SchemeQuantizer(adadfq_plugin.Scheme())  # the README takes any
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    example_inputs = (torch.randn(16, 3, 16, 16),)
    model(*example_inputs)
    expected = model.eval()(*example_inputs).detach()
    lengths = {"warmup_steps": 2, "refine_steps": 2, "steps": 2}
    short = {**lengths, "samples": 16, "batch_size": 8, "range_samples": 16}
    quick = functools.partial(adadfq_plugin.calibrate, settings=short)
    monkeypatch.setattr(adadfq_plugin, "calibrate", quick)
    names |= {"model": model, "example_inputs": example_inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the input size is a guess here, and the API says so
        exec(next(block for block in blocks(page, "python") if f"{convert}(" in block), names)
    quantized = names["quantized"]
    assert isinstance(quantized, nn.Module)
    kinds = [type(module).__module__ for module in quantized.modules()]
    targets = [str(node.target) for node in names["quantized"].graph.nodes]
    assert sum("quantized" in name for name in [*kinds, *targets]) >= 2
    error = quantized(*example_inputs).detach() - expected
    assert float(error.std()) < 0.2 * float(expected.std())


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_every_command_line_is_one_that_adadfq_understands(command: str) -> None:
    words = shlex.split(command)[1:]
    subcommand = main.commands[words[0]]
    subcommand.make_context(words[0], words[1:]).close()


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert local
    missing = [target for target in local if not (ROOT / target).is_file()]
    assert not missing
