"""The report says what was measured, what was guessed and what wasn't measured, in three forms."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adadfq_plugin.config import AdaDFQSettings, Scheme
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import OutputError
from adadfq_plugin.facts import Facts
from adadfq_plugin.history import History
from adadfq_plugin.report import Accuracy, Latency, Report, environment, measure_latency, write
from adadfq_plugin.report.figures import information_plot, loss_curves, sample_grid


def samples(count: int = 8, channels: int = 3, side: int = 16) -> SyntheticDataset:
    facts = Facts(
        (channels, side, side),
        10,
        (0.5,) * channels,
        (0.5,) * channels,
        sources={"input_size": "argument", "mean": "guess: nobody says"},
    )
    values = torch.linspace(-1, 1, count * channels * side * side).view(count, channels, side, side)
    return SyntheticDataset(values, torch.arange(count) % 10, facts)


def history() -> History:
    rows = History()
    for step in range(1, 30):
        rows.record("warmup", step, {"bns": 1 / step})
        rows.record("game", step, {"margin": 0.1 * step, "kl": float("nan") if step == 3 else 1.0})
    return rows


def make(**changes: Any) -> Report:
    bare = Report(
        name="resnet_x|<b>`y`</b>",
        method="adadfq",
        backend="fx",
        scheme=Scheme().model_dump(),
        settings=AdaDFQSettings().model_dump(),
        seed=5,
        samples=samples(),
    )
    return dataclasses.replace(bare, **changes)


def full() -> Report:
    return make(
        history=history(),
        seconds={"warmup": 75.0, "game": 7.25},
        agreement=0.984,
        fidelity=0.996,
        integer_share=0.975,
        sqnr_db=25.04,
        information=torch.tensor([0.05, 0.2, 0.5, 0.9]),
        boundaries=(0.1, 0.8),
        notes=["the ranges come\nfrom 256 images"],
        warnings=["look <script>out</script>"],
        accuracy=Accuracy(
            {"float": 0.878, "fake-quantized": 0.872, "converted": 0.866}, 500, "/images/val", "numbers"
        ),
        sizes={"float": 18_600_000, "converted": 4_836_000},
        latency=Latency({"float": 30.0, "converted": 12.0}, 2, 50),
        environment=environment(),
    )


def written(report: Report, folder: Path) -> tuple[str, dict[str, Any], str]:
    write(report, folder)
    values: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return (folder / "report.md").read_text(), values, (folder / "report.html").read_text()


def test_the_figures_stand_in_the_report(tmp_path: Path) -> None:
    text, values, _ = written(full(), tmp_path)
    assert "| top-1 on 500 images | 87.8 % | 87.2 % | 86.6 % |" in text
    assert "| size on disk | 18.60 MB | | 4.84 MB (0.26 of float) |" in text
    assert "| one image, 2 threads | 30.0 ms | | 12.0 ms (2.50 times as fast) |" in text
    assert "| agreement with float on the synthetic set | | 98.4 % | |" in text
    assert "| multiply-adds on integers | | | 97.5 % |" in text
    assert "| agreement with fake-quantized on the synthetic set | | | 99.6 % |" in text
    assert "| SQNR of the logits on the synthetic set | | 25.0 dB | |" in text
    assert "converted and float is -1.2 points on 500 images" in text
    assert "standard error of 1.5 points" in text
    assert "| 25.0 % | 50.0 % | 25.0 % |" in text
    assert "| `warmup` | 1 min 15 s |" in text
    assert "- the ranges come from 256 images" in text
    assert values["accuracy"]["standard_error"]["float"] == pytest.approx((0.878 * 0.122 / 500) ** 0.5)
    assert values["shares"] == {"below": 0.25, "between": 0.5, "above": 0.25}
    assert values["settings"]["lambda_l"] == 0.1
    none = make(information=torch.full((4,), torch.nan), boundaries=(0.1, 0.8)).shares()
    assert none == {"below": 0, "between": 0, "above": 0}
    assert values["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert values["history"][2]["step"] == 2


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    text, values, page = written(make(), tmp_path)
    assert "No labelled images were given" in text
    assert "they flatter it" in text
    assert "the network was not timed" in text
    assert "top-1 on" not in text
    assert text.count("not measured") >= 3
    assert values["accuracy"] is values["latency"] is values["agreement"] is None
    assert "Where the samples lie" not in page


def test_what_was_guessed_is_said(tmp_path: Path) -> None:
    text, values, _ = written(make(), tmp_path)
    assert "- `mean` = `[0.5, 0.5, 0.5]` (nobody says)" in text
    assert values["guesses"] == {"mean": "guess: nobody says"}
    facts = Facts((3, 16, 16), 10, sources={"mean": "argument"})
    sure = SyntheticDataset.from_pixels(samples().pixels, samples().labels, facts)
    assert "## What was guessed\n\nNothing." in written(make(samples=sure), tmp_path)[0]


@pytest.mark.parametrize(("bits", "said"), [((8, 8), False), ((4, 8), True), ((8, 4), True)])
def test_narrow_networks_promise_no_speed(tmp_path: Path, bits: tuple[int, int], said: bool) -> None:
    scheme = Scheme(weight_bits=bits[0], activation_bits=bits[1])
    text = written(make(scheme=scheme.model_dump()), tmp_path)[0]
    assert f"quantized to W{bits[0]}A{bits[1]}" in text
    assert ("still store and compute 8-bit integers" in text) is said


def test_a_model_that_the_user_prepared_has_no_scheme(tmp_path: Path) -> None:
    text = written(make(scheme=None), tmp_path)[0]
    assert "quantized as prepared" in text
    assert "weights of" not in text


def test_the_page_is_whole_and_safe(tmp_path: Path) -> None:
    page = written(full(), tmp_path)[2]
    assert "<script" not in page
    assert "<b>" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing is fetched
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)
    ]
    assert len(pictures) == 3
    assert [picture.format for picture in pictures] == ["PNG"] * 3
    assert "25.0 % lie below the lower boundary, 50.0 % between the two, 25.0 % above" in page
    assert page.count("<table>") == full_tables(tmp_path)


def full_tables(folder: Path) -> int:
    return len(re.findall(r"^\|[-|]+\|$", (folder / "report.md").read_text(), flags=re.MULTILINE))


def test_nan_becomes_null(tmp_path: Path) -> None:
    _, values, _ = written(make(sqnr_db=float("inf"), history=history()), tmp_path)
    assert values["sqnr_db"] is None
    assert values["history"][5]["kl"] is None


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        write(make(), tmp_path / "file")


def picture(png: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_grid_holds_the_samples_themselves() -> None:
    data = samples(4)
    grid = picture(sample_grid(data, rows=2, columns=2))
    assert grid.shape == (34, 34, 3)
    for index, (top, left) in enumerate([(0, 0), (0, 18), (18, 0), (18, 18)]):
        cell = grid[top : top + 16, left : left + 16]
        assert (cell == data.pixels[index].permute(1, 2, 0).numpy()).all()


def test_the_grid_spans_the_whole_set_and_scales_down() -> None:
    data = samples(9, side=16)
    grid = picture(sample_grid(data, rows=1, columns=2, cell=8))
    assert grid.shape == (8, 18, 3)
    last = data.pixels[8].float().mean(dim=(1, 2)).numpy()
    np.testing.assert_allclose(grid[:, 10:].mean(axis=(0, 1)), last, atol=1)
    assert picture(sample_grid(samples(2, channels=1))).shape[2] == 3


def test_curves_need_something_to_draw() -> None:
    one = History()
    one.record("warmup", 1, {"bns": 1.0})
    assert loss_curves(History()) is None
    assert loss_curves(one) is None
    three, two = loss_curves(history()), loss_curves(history(), columns=2)
    assert three is not None
    assert two is not None
    assert picture(three).shape[1] * 2 == picture(two).shape[1] * 3


@pytest.mark.parametrize("information", [torch.rand(50, generator=torch.Generator()), torch.tensor([])])
def test_boundaries_are_drawn_where_there_are_some(information: Tensor) -> None:
    plain = picture(information_plot(information, None))
    marked = picture(information_plot(information, (0.1, 0.8)))
    orange = (np.abs(marked.astype(int) - np.array([200, 87, 27])).sum(axis=2) < 20).sum()
    assert orange > 100
    assert (np.abs(plain.astype(int) - np.array([200, 87, 27])).sum(axis=2) < 20).sum() == 0


class Slow(nn.Module):
    """Takes a given share of a small matrix product's time."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(self.turns):
            x = x @ x
        return x


def test_latency_takes_turns() -> None:
    networks = {"float": Slow(40), "converted": Slow(1)}
    latency = measure_latency(networks, torch.zeros(64, 64), rounds=9)
    assert latency.rounds == 9
    assert latency.threads == torch.get_num_threads()
    assert networks["float"].calls == networks["converted"].calls == 14
    assert latency.milliseconds["float"] > 3 * latency.milliseconds["converted"] > 0
    assert measure_latency(networks, torch.zeros(64, 64), seconds=0.0).rounds == 1


def test_the_environment_names_the_processor() -> None:
    found = environment()
    assert found["cpu"]
    assert found["vnni"] is bool(torch.cpu._is_vnni_supported())
    assert found["threads"] == torch.get_num_threads()


def test_what_is_no_number_was_measured_all_the_same(tmp_path: Path) -> None:
    write(make(sqnr_db=float("nan")), tmp_path)
    line = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "SQNR" in line)
    assert "nan dB" in line
    assert json.loads((tmp_path / "report.json").read_text())["sqnr_db"] is None


def test_what_was_not_refined_is_not_said_to_be(tmp_path: Path) -> None:
    for steps, words in ((0, "are as it made them"), (None, "were then refined")):
        settings = {**AdaDFQSettings().model_dump(), "refine_steps": steps}
        write(make(settings=settings, information=torch.linspace(0, 1, 4), boundaries=(0.1, 0.8)), tmp_path)
        assert words in (tmp_path / "report.md").read_text()


def test_the_device_is_named_and_sums_on_a_gpu_are_not_promised_again(tmp_path: Path) -> None:
    for device, again in (("cpu", True), ("cuda:1 (NVIDIA X)", False)):
        write(make(environment={**environment(), "device": device}), tmp_path)
        text = (tmp_path / "report.md").read_text()
        assert ("bit for bit" in text) == again
        assert f"| `device` | `{device}` |" in text
