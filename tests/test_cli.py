"""The ``adadfq`` command, from the words that a user types to the files, lines and exit codes that come of them."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import click
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from adadfq_plugin import api, errors
from adadfq_plugin.cli import job, main
from adadfq_plugin.cli.options import plan
from adadfq_plugin.cli.progress import Bars
from adadfq_plugin.config import AdaDFQSettings, Scheme, from_toml, to_toml
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import SettingsError
from adadfq_plugin.hooks import fork_rng
from adadfq_plugin.registry import RegistryEntry

NAME = "test_resnet"
SMALL = ("--img-size", "32", "--batch-size", "4", "--steps", "2")
FACTS = (
    *("--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5),
    *("--crop-pct", 0.95, "--interpolation", "bilinear"),
)
GENERATOR = (
    "--warmup-steps", "2", "--refine-steps", "2", "--generator-width", "16", "--latent-dim", "8",
)  # fmt: skip
KEPT = ("--samples", "8")
FILES = {"quantized.pt", "report.html", "report.json", "report.md", "samples.safetensors", "settings.toml"}


class Ended(NamedTuple):
    code: int
    output: str


def adadfq(*words: object) -> Ended:
    result = CliRunner().invoke(main, [str(word) for word in words])
    return Ended(result.exit_code, result.output)


class Given(NamedTuple):
    """A trained network of ten classes, labelled images, and how to say so."""

    checkpoint: Path
    images: Path
    bare: tuple[object, ...]
    """Without the settings that only some commands and methods have."""
    words: tuple[object, ...]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    with fork_rng(0):
        model = timm.create_model(NAME, num_classes=10).train()
        with torch.no_grad():
            for _ in range(5):  # statistics that a prior can work with
                model(torch.randn(16, 3, 32, 32))
        torch.save(model.state_dict(), folder / "net.pt")
    for index in range(10):
        (folder / "val" / str(index)).mkdir(parents=True)
        for shade in (60, 190):
            Image.new("RGB", (40, 36), (25 * index, shade, 90)).save(
                folder / "val" / str(index) / f"{shade}.png"
            )
    bare = (NAME, "--checkpoint", folder / "net.pt", "--num-classes", 10, *SMALL, *FACTS)
    return Given(folder / "net.pt", folder / "val", bare, (*bare, *KEPT, *GENERATOR))


class Run(NamedTuple):
    folder: Path
    output: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def run(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole run with labelled images."""
    folder = tmp_path_factory.mktemp("run") / "out"
    ended = adadfq("quantize", *given.words, "--val", given.images, "--seed", 3, "-o", folder)
    assert ended.code == 0, ended.output
    return Run(folder, ended.output, json.loads((folder / "report.json").read_text()))


def test_one_folder_with_all_that_came_of_it(run: Run, given: Given) -> None:
    assert {file.name for file in run.folder.iterdir()} == FILES
    assert [path.name for path in run.folder.parent.iterdir()] == ["out"]
    report = run.report
    assert (report["name"], report["method"], report["bits"], report["seed"]) == (NAME, "adadfq", "W8A8", 3)
    assert report["backend"] == "fx"
    assert report["notes"][0].startswith("backend 'auto' took 'fx'")
    assert report["accuracy"]["count"] == 20
    assert set(report["accuracy"]["top1"]) == {"float", "fake-quantized", "converted"}
    assert report["sizes"]["converted"] == (run.folder / "quantized.pt").stat().st_size
    assert set(report["latency"]["milliseconds"]) == {"float", "converted"}
    assert report["facts"]["input_size"] == [3, 32, 32]
    assert report["facts"]["sources"]["input_size"] == "argument"
    assert report["facts"]["sources"]["mean"] == "argument"
    assert report["network"]["checkpoint"] == str(given.checkpoint)
    assert f"`{given.checkpoint}`" in (run.folder / "report.md").read_text()
    assert report["accuracy"]["classes"] == "numbers of classes, from 0"
    assert 0 <= report["agreement"] <= 1
    assert report["fidelity"] >= 0.875
    assert report["integer_share"] == 1
    assert len(report["information"]) == report["samples"] == 8
    assert {row["phase"] for row in report["history"]} >= {"warmup", "game"}
    assert report["boundaries"] == [0.1, 0.8]
    assert "top-1 on 20 images: float" in run.output
    assert str(run.folder) in run.output


def test_the_model_reloads_without_this_package(run: Run) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        f"model = torch.jit.load({str(run.folder / 'quantized.pt')!r})\n"
        "print(tuple(model(torch.zeros(1, 3, 32, 32)).shape), 'adadfq_plugin' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "(1, 10) False"


def test_the_other_backend(given: Given, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="backend pt2e needs torchao")
    words = (*given.words, "--backend", "pt2e", "--val", given.images, "-o", tmp_path / "out")
    ended = adadfq("quantize", *words)
    assert ended.code == 0, ended.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES - {"quantized.pt"} | {
        "quantized.pt2"
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["backend"] == "pt2e"
    assert report["fidelity"] == 1
    assert report["integer_share"] == 1
    assert any("compiled" in note for note in report["notes"])
    converted = adadfq("evaluate", tmp_path / "out", "--val", given.images)
    top1 = report["accuracy"]["top1"]["converted"]
    assert f"converted top-1 {100 * top1:.2f} % " in converted.output


def test_the_samples_say_where_they_are_from(run: Run) -> None:
    samples = SyntheticDataset.load(run.folder / "samples.safetensors")
    assert samples.pixels.shape == (8, 3, 32, 32)
    assert samples.provenance["method"] == "adadfq"
    assert samples.provenance["seed"] == 3
    assert samples.provenance["network"]["name"] == NAME
    assert samples.provenance["versions"]["timm"] == timm.__version__


def test_the_settings_repeat_the_run(run: Run, tmp_path: Path) -> None:
    told = from_toml(run.folder / "settings.toml")
    assert told["settings"]["warmup_steps"] == 2
    again = adadfq("quantize", "--config", run.folder / "settings.toml", "-o", tmp_path / "again")
    assert again.code == 0, again.output
    assert (tmp_path / "again" / "settings.toml").read_text() == (run.folder / "settings.toml").read_text()
    for name in ("samples.safetensors", "settings.toml"):
        assert (tmp_path / "again" / name).read_bytes() == (run.folder / name).read_bytes()
    images = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    load = api.backends().get("fx").load
    first, second = (load(folder / "quantized.pt") for folder in (run.folder, tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(first(images), second(images))
    assert json.loads((tmp_path / "again" / "report.json").read_text())["accuracy"] is None
    assert "accuracy: not measured" in again.output


def test_evaluate_finds_what_the_report_says(run: Run, given: Given) -> None:
    top1 = run.report["accuracy"]["top1"]
    converted = adadfq("evaluate", run.folder, "--val", given.images)
    assert converted.code == 0, converted.output
    assert f"converted top-1 {100 * top1['converted']:.2f} % " in converted.output
    words = ("--checkpoint", given.checkpoint, "--num-classes", 10, "--img-size", 32, *FACTS)
    plain = adadfq("evaluate", NAME, *words, "--val", given.images, "-b", 7)
    assert plain.code == 0, plain.output
    assert (
        f"float top-1 {100 * top1['float']:.2f} % ({round(20 * top1['float'])} of 20 images)" in plain.output
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop_mode": "round"}, "crop_mode = 'round'"),
        ({"facts": {"interpolation": "cubic"}}, "interpolation = 'cubic'"),
        ({"facts": {"std": [0.5]}}, "std has 1 values for 3 channels"),
    ],
)
def test_a_damaged_report_is_named(
    run: Run, given: Given, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    report = {**run.report, **change, "facts": {**run.report["facts"], **change.get("facts", {})}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    refused(4, rf"{tmp_path} is no folder .*{said}", "evaluate", tmp_path, "--val", given.images)


def test_weights_that_are_none_are_refused_before_any_image(given: Given, tmp_path: Path) -> None:
    state = torch.load(given.checkpoint)
    state["fc.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "net.pt")
    words = (NAME, "--checkpoint", tmp_path / "net.pt", "--num-classes", 10, "--img-size", 32)
    refused(3, r"'fc\.weight' holds NaN", "evaluate", *words, "--val", given.images)


def test_evaluate_knows_its_own_folders(run: Run, given: Given, tmp_path: Path) -> None:
    other = adadfq("evaluate", tmp_path, "--val", given.images)
    assert (other.code, "no folder that 'adadfq quantize' wrote" in other.output) == (4, True)
    told = adadfq("evaluate", run.folder, "--val", given.images, "--img-size", 64)
    assert (told.code, "--img-size" in told.output) == (2, True)


@pytest.mark.parametrize("form", ["set.safetensors", "set.npz", "set"])
def test_synthesize(given: Given, tmp_path: Path, form: str) -> None:
    command = ("synthesize", *given.bare, *GENERATOR, "--method", "bn_stats", "-n", 5, "-o", tmp_path / form)
    ended = adadfq(*command)
    assert ended.code == 0, ended.output
    assert "5 images 3x32x32 by bn_stats, seed 0" in ended.output
    assert len(SyntheticDataset.load(tmp_path / form)) == 5
    again = adadfq(*command)
    assert (again.code, "--force" in again.output or "not empty" in again.output) == (5, True)
    assert [path.name for path in tmp_path.iterdir()] == [form]


def test_a_file_that_appears_during_the_run_is_not_replaced(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, original = tmp_path / "set.npz", api.synthesize

    def meanwhile(*args: Any, **arguments: Any) -> SyntheticDataset:
        file.write_text("another's")
        return original(*args, **arguments)

    monkeypatch.setattr(api, "synthesize", meanwhile)
    words = ("synthesize", *given.bare, *GENERATOR, "--method", "bn_stats", "-n", 2)
    refused(5, r"set\.npz exists", *words, "-o", file)
    assert file.read_text() == "another's"


def test_methods_and_their_presets() -> None:
    ended = adadfq("methods")
    assert ended.code == 0
    for name in ("adadfq", "bn_stats", "noise"):
        method = api.methods().get(name)
        assert re.search(
            rf"^{name}  {re.escape(method.summary)} \(adadfq_plugin ", ended.output, re.MULTILINE
        )
        for preset in method.presets:
            assert f"  --preset {preset}: " in ended.output


def test_broken_plugins_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = RegistryEntry("noise", "adadfq_plugin", "1", "a:b", "ok")
    broken = RegistryEntry("other", "their-plugin", "0.3", "theirs:Method", "ImportError: no module 'theirs'")
    registry = SimpleNamespace(entries=lambda: [noise, broken], get=api.methods().get)
    monkeypatch.setattr(api, "methods", lambda: registry)
    ended = adadfq("methods")
    assert ended.code == 0
    assert "other  BROKEN (their-plugin 0.3, theirs:Method): ImportError: no module 'theirs'" in ended.output
    assert ended.output.startswith("noise  ")


def test_help_has_each_setting_with_its_default() -> None:
    text = " ".join(adadfq("quantize", "--help").output.split())
    for kind in (Scheme, AdaDFQSettings):
        for name, field in kind.model_fields.items():
            flag = f"--{name.replace('_', '-')}"
            assert f"{flag} " in text
            assert " ".join((field.description or "").split()) in text
            if field.default is not None and not isinstance(field.default, tuple):
                told = text[text.index(f" {flag} ") :]
                assert f"[default: {field.default}]" in told


def test_help_tells_the_exit_codes_of_the_errors() -> None:
    text = adadfq("--help").output
    told = {int(code) for code in re.findall(r"^ +(\d+) {2,}\w", text, re.MULTILINE)}
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.AdaDFQError)
    ]
    assert told == {kind.exit_code for kind in kinds} | {0, 130}


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom adadfq_plugin.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: print(*{'torch', 'timm', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    for words in (["--version"], ["--help"], ["quantize", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == ""


def refused(code: int, said: str, *words: object) -> None:
    ended = adadfq(*words)
    lines = [line for line in ended.output.splitlines() if line.startswith("adadfq: error: ")]
    assert ended.code == code, ended.output
    assert len(lines) == 1, ended.output
    assert re.search(said, lines[0]), lines[0]
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "adaqfd"), r"unknown method 'adaqfd'.*'adadfq'"),
        (("--preset", "paper_cifa"), r"no preset 'paper_cifa', did you mean 'paper_cifar'"),
        (("--backend", "fxx"), r"unknown backend 'fxx'.*'fx'"),
        (("--lambda-ll", "0.1"), r"--lambda-ll.*--lambda-l"),
        (("--weight-bits", "9"), r"weight_bits = 9"),
        (("--weight-bits", "two"), r"two"),
        (("--lambda-l", "0.9"), r"lambda_l \(0\.9\) must lie below lambda_u"),
        (("--method", "noise"), r"method 'noise' has no setting 'latent_dim' \(it has: samples"),
        (("--minutes", "0"), r"minutes = 0"),
        (("--model-kwargs", "colour"), r"KEY=VALUE, not 'colour'"),
        (("--model-kwargs", "colour=red"), r"test_resnet.*colour"),
        (
            ("--input-size", "1", "32", "32", "--mean", "0.5", "0.5", "0.5"),
            r"mean and std don.t fit each other",
        ),
        (("--config", "nowhere.toml"), r"nowhere\.toml"),
        (("--minutes", 1), "leave one of them unset"),
    ],
)
def test_settings_that_cannot_be_used(
    given: Given, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    refused(2, said, "quantize", *given.words, *words, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[setings]\n", r"\[setings\], did you mean 'settings'"),
        ("[settings]\ngama = 1\n", r"no setting 'gama', did you mean 'gamma'"),
        ("[network]\nimage_size = 32\n", r"no setting 'image_size', did you mean 'img_size'"),
        ("[scheme]\nweight_bits = 1\n", r"weight_bits = 1"),
        ("run = 3\n", r"run must be a section"),
        ("[run\n", r"settings\.toml"),
    ],
)
def test_settings_files_that_cannot_be_used(given: Given, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "settings.toml").write_text(text)
    refused(2, said, "quantize", *given.words, "--config", tmp_path / "settings.toml", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "which network"),
        (("resnet81",), r"did you mean 'resnet\d+"),
        (("demo:tf_efficientnet_lite",), "did you mean 'tf_efficientnet_lite0'"),
        (("demo:tf_efficientnet_lite0", "--checkpoint", "x"), "comes as it is, without --checkpoint"),
    ],
)
def test_no_such_network(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    refused(2, said, "quantize", *words, "-o", tmp_path / "out")


def test_a_corrupt_checkpoint(given: Given, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(given.checkpoint.read_bytes()[:1000])
    words = ("--checkpoint", tmp_path / "net.pt")
    refused(4, r"net\.pt can't be read", "quantize", *given.words, *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_found_before_the_work(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(api, "quantize", work)
    images = tmp_path / "val"
    for index in range(10):
        (images / str(index)).mkdir(parents=True)
        (images / str(index) / "x.png").write_bytes((given.images / str(index) / "60.png").read_bytes())
    (images / "7" / "x.png").write_bytes(b"no image")
    refused(4, rf"{images}/7/x\.png", "quantize", *given.words, "--val", images, "-o", tmp_path / "out")
    refused(
        4, "no such folder", "quantize", *given.words, "--val", tmp_path / "nowhere", "-o", tmp_path / "out"
    )
    monkeypatch.setattr(api, "evaluate", work)
    words = (*given.words, "--val", given.images, "-o", tmp_path / "out", "--device", "cuda:99")
    refused(2, "device 'cuda:99' can't be used", "quantize", *words)
    words = (*words[:-2], "--preset", "paper_cifar", "--minutes", "5")
    refused(2, "minutes = 5 has no say where refine_steps, steps, warmup_steps are set", "quantize", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["val"]


def test_outputs_are_refused_before_the_work(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the network has been loaded")

    monkeypatch.setattr("adadfq_plugin.cli.job.load", load)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("old")
    for output, said in (("file", "is a file"), ("file/out", "can't write"), ("full", "not empty.*--force")):
        refused(5, said, "quantize", *given.words, "-o", tmp_path / output)
    for output in ("file", "file/set.npz", "set.pkl", "full"):
        refused(5, output, "synthesize", *given.bare, "-o", tmp_path / output)
    assert (tmp_path / "full" / "kept").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_what_the_results_are_made_from_is_not_replaced(given: Given, tmp_path: Path) -> None:
    words = ("quantize", *given.bare, *KEPT, "--force", "--val", given.images)
    photos = adadfq(*words, "-o", given.images)
    assert (photos.code, "holds something else, no report.json" in photos.output) == (5, True), photos.output
    (given.checkpoint.parent / "report.json").touch()
    beside = adadfq(*words, "-o", given.checkpoint.parent)
    (given.checkpoint.parent / "report.json").unlink()
    assert (beside.code, f"holds {given.checkpoint} (--checkpoint)" in beside.output) == (5, True), (
        beside.output
    )


def test_facts_of_other_weights_are_guesses(given: Given) -> None:
    words = (NAME, "--checkpoint", given.checkpoint, "--num-classes", 10, "--img-size", 32)
    with pytest.warns(UserWarning, match=r"mean = \(0.5, 0.5, 0.5\) \(guess: timm's of test_resnet"):
        job.load(
            plan({"name": NAME, "checkpoint": str(words[2]), "num_classes": 10, "img_size": 32}, None).network
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workers", 3), "--class-map and --workers are of labelled images"),
        (("--class-map", "nowhere.txt"), "--class-map and --workers are of labelled images"),
        (("--input-size", 3, 64, 64), r"img_size \(32\) and input_size \(3, 64, 64\) contradict"),
    ],
)
def test_options_that_say_nothing_or_two_things(
    given: Given, tmp_path: Path, words: tuple[Any, ...], said: str
) -> None:
    ended = adadfq("quantize", *given.bare, *words, "-o", tmp_path / "out")
    assert ended.code == 2
    assert re.search(said, ended.output), ended.output


def test_what_was_given_comes_back_from_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kwargs = {"act_layer": None, "drop_rate": 0.5, "sizes": (1, None), "mode": "fast", "kept": {1, 2}}
    network = plan({"name": NAME, "checkpoint": "net.pt", "model_kwargs": kwargs}, None).network
    Path("settings.toml").write_text(to_toml({"network": network.told()}), encoding="utf-8-sig")
    again = plan({"name": ""}, Path("settings.toml")).network
    assert again.model_kwargs == kwargs
    assert again.checkpoint == str(tmp_path / "net.pt")
    for source in ("local-dir", "Local-Dir"):
        local = plan({"name": f"{source}:here"}, None).network
        assert local.told() == {"name": f"local-dir:{tmp_path}/here"}
    assert plan({"name": "hf-hub:local-dir:here"}, None).network.folder is None


def test_a_path_that_is_no_text_is_refused_or_shown(given: Given, tmp_path: Path) -> None:
    strange = plan({"name": NAME, "checkpoint": "caf\udce9.pt"}, None)
    with pytest.raises(SettingsError, match=r"checkpoint = .*caf.\.pt.*: no UTF-8"):
        job._settings(strange, AdaDFQSettings())
    assert job._printable("/data/caf\udce9") == "/data/caf\ufffd"


def test_force_replaces(given: Given, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("old", "report.json"):
        (tmp_path / "out" / name).write_text("old")
    words = ("quantize", *given.bare, *KEPT, "--method", "noise", "--force", "-o", tmp_path / "out")
    assert adadfq(*words, "--lambda-l", "0.2").code == 2
    assert (tmp_path / "out" / "old").exists()
    ended = adadfq(*words)
    assert ended.code == 0, ended.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["boundaries"] is None


@pytest.mark.filterwarnings("ignore:adadfq_plugin. on the synthetic set the converted network")
@pytest.mark.parametrize("worth", [1.0, float("nan")])
def test_an_unfaithful_conversion_is_not_passed_over(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: float
) -> None:
    class Wrong(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[images[:, 0, 0, 0].mul(1e4).long() % 10] * worth

    wrong = torch.fx.symbolic_trace(Wrong())
    monkeypatch.setattr("adadfq_plugin.backends.fx.FXPrepared.convert", lambda _: wrong)
    words = (*given.bare, *KEPT, "--method", "noise", "--steps", 0)
    ended = adadfq("quantize", *words, "-o", tmp_path / "out")
    assert ended.code == 0, ended.output
    assert (
        "warning: on the synthetic set the converted network agrees with the fake-quantized one"
        in ended.output
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["fidelity"] < 0.98
    assert any("it is not the network that was calibrated" in line for line in report["warnings"])


@pytest.mark.parametrize("writer", ["pathlib.Path.write_bytes", "torch.jit.save"])
def test_a_full_disk(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        if writer == "torch.jit.save":
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, full)
    words = ("quantize", *given.bare, *KEPT, "--method", "noise", "--steps", 0, "-o", tmp_path / "out")
    refused(5, r"can't write .*out.*(No space left|file write failed)", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "phase", ["load", "top-1 of float", "warmup", "samples", "ranges", "rounding", "game", "time", "write"]
)
def test_an_interrupt_in_any_phase_leaves_nothing(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    shown = Bars.__call__

    def interrupt(bars: Bars, now: str, step: int, total: int, figures: Mapping[str, float]) -> None:
        shown(bars, now, step, total, figures)
        if now == phase and (step or phase == "write"):  # after its last step all is written
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "__call__", interrupt)
    ended = adadfq("quantize", *given.words, "--val", given.images, "-o", tmp_path / "out")
    assert ended.code == 130, ended.output
    assert ended.output.splitlines()[-1] == "adadfq: interrupted; nothing half-written is left"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_files_are_written_leaves_nothing(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def interrupt(_report: Any, folder: Path) -> None:
        seen.extend(file.name for file in folder.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("adadfq_plugin.cli.job.write", interrupt)
    words = (*given.bare, *KEPT, "--method", "noise", "--steps", 0)
    assert adadfq("quantize", *words, "-o", tmp_path / "out").code == 130
    assert {"quantized.pt", "samples.safetensors"} <= set(seen)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c(given: Given, tmp_path: Path) -> None:
    words = [
        str(word) for word in ("quantize", *given.words, "--warmup-steps", 10**6, "-o", tmp_path / "out")
    ]
    # a shell's job in the background ignores the signal, and so do its children
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = f"{heard}import sys\nfrom adadfq_plugin.cli import main\nmain(sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()  # the first phase is over, the long one runs
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        process.wait(60)
    assert first.startswith("load: ")
    assert rest.splitlines()[-1] == "adadfq: interrupted; nothing half-written is left"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_tracebacks_are_for_debugging(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise ZeroDivisionError("by zero\nin two lines")

    monkeypatch.setattr("adadfq_plugin.cli.job.load", fail)
    words = ("quantize", *given.words, "-o", tmp_path / "out")
    refused(1, r"ZeroDivisionError: by zero in two lines \(--debug shows where\)", *words)
    ended = adadfq(*words, "--debug")
    assert ended.code == 1
    assert "Traceback" in ended.output
    assert "in fail" in ended.output


def test_our_warnings_are_shown_and_others_are_not(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = str(Path(api.__file__))

    def load(*_args: Any, **_kwargs: Any) -> None:
        warnings.simplefilter("default")
        warnings.warn_explicit("ours", UserWarning, own, 1)
        warnings.warn_explicit("theirs", UserWarning, "/somewhere/torch/nn.py", 1)
        raise errors.ModelError("enough")

    monkeypatch.setattr("adadfq_plugin.cli.job.load", load)
    words = ("quantize", *given.words, "-o", tmp_path / "out")
    before = warnings.showwarning
    shown = adadfq(*words).output
    assert ("adadfq: warning: ours" in shown, "theirs" in shown) == (True, False)
    assert "adadfq: warning: theirs" in adadfq(*words, "--debug").output
    assert warnings.showwarning is before


def test_options_take_values_as_timm_s_do() -> None:
    command = main.commands["quantize"]
    assert isinstance(command, click.Command)
    words = "--mean 0.1 0.2 -3e-1 --model-kwargs a=1 b=x c=[1,2] resnet18 --std 0.5 -o out --stages 0.5 --no-replay"
    with command.make_context("quantize", words.split()) as context:
        values = context.params
    assert values["name"] == "resnet18"
    assert values["mean"] == (0.1, 0.2, -0.3)
    assert values["std"] == (0.5,)
    assert values["replay"] is False
    planned = plan(
        {key: value for key, value in values.items() if key not in ("output", "force", "config")}, None
    )
    assert planned.network.model_kwargs == {"a": 1, "b": "x", "c": [1, 2]}
    assert planned.settings == {"stages": (0.5,), "replay": False}


def test_options_come_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(
        '[network]\nname = "a"\n[scheme]\nweight_bits = 4\nactivation_bits = 5\n'
    )
    planned = plan({"weight_bits": 6, "activation_bits": None, "mean": ()}, tmp_path / "settings.toml")
    assert (planned.scheme.weight_bits, planned.scheme.activation_bits) == (6, 5)
    assert planned.network.mean is None
    with pytest.raises(SettingsError, match="which network"):
        plan({}, None)


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_a_size_that_the_network_does_not_take_is_refused_before_any_image(
    given: Given, tmp_path: Path, command: str
) -> None:
    words = (command, *given.bare[:1], "--num-classes", 10, "--checkpoint", given.checkpoint)
    output = ("-o", tmp_path / "out") if command == "quantize" else ()
    refused(3, "does not take images", *words, "--input-size", 1, 32, 32, "--val", given.images, *output)


@pytest.mark.parametrize("value", [3, [3]])
def test_arguments_of_a_network_in_another_form_are_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "net.toml").write_text(to_toml({"network": {"name": NAME, "model_kwargs": value}}))
    with pytest.raises(SettingsError, match=r"net\.toml: model_kwargs = .* is no table"):
        plan({}, tmp_path / "net.toml")


def test_another_method_leaves_out_what_it_has_no_setting_for(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    values: dict[str, Any] = {
        "network": {"name": NAME},
        "run": {"method": "adadfq"},
        "settings": {"latent_dim": 8, "samples": 9},
    }
    file.write_text(to_toml(values))
    assert plan({}, file).settings == {"latent_dim": 8, "samples": 9}
    assert plan({"method": "noise"}, file).settings == {"samples": 9}
    file.write_text(to_toml({**values, "settings": {"latent_dims": 8}}))
    assert plan({"method": "noise"}, file).settings == {"latent_dims": 8}  # which the method refuses


def test_a_line_for_each_phase_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(terminal=False) as bars:
        for step in range(1, 4):
            bars("warmup", step, 3, {"loss": 1.0})
        bars("game", 1, 5, {})
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["warmup: 3/3", "game: 1/5"]


def test_each_phase_has_its_own_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("adadfq_plugin.cli.progress.time.perf_counter", lambda: now)
    with Bars(terminal=False) as bars:
        for at, phase, step in [
            *((1, "load", 0), (4, "load", 1), (9, "game", 1), (11, "game", 2)),
            *((20, "write", 0), (22, "write", 1), (30, "", 0)),
        ]:
            now = at
            bars(phase, step, 2, {})
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["load: 1/2, 3.0 s", "game: 2/2, 7.0 s", "write: 1/2, 2.0 s"]


def test_the_weights_are_not_replaced_by_the_images(given: Given, tmp_path: Path) -> None:
    weights = tmp_path / "net.safetensors"
    with fork_rng(0):
        save_file(timm.create_model(NAME, num_classes=10).state_dict(), weights)
    before = weights.read_bytes()
    words = (NAME, "--checkpoint", weights, "--num-classes", 10, *SMALL, *GENERATOR, "-n", 2, "--force")
    refused(5, "--checkpoint.*would be replaced", "synthesize", *words, "-o", weights)
    assert weights.read_bytes() == before


def test_bars_with_the_time_left_where_somebody_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with Bars(terminal=True) as bars:
        bars("later", 0, 7, {})
        bars("warmup", 2, 2, {"loss": 0.25})
        for step in (1, 2, 3):
            time.sleep(0.02)
            bars("game", step, 30, {"margin": 0.125, "kl": 2.0})
    shown = capsys.readouterr().err
    assert re.search(r"later .*0/7 .*-:--:-- --:--", shown)  # announced, and no time made up for it
    assert re.search(r"warmup .*2/2 .*loss 0\.25", shown)
    assert re.search(r"game .*3/30 .*0:00:00 00:0[01] +margin 0\.125 +kl 2", shown)


@pytest.mark.filterwarnings("always:not told, so taken")
def test_a_grey_network_is_told_by_its_channels(tmp_path: Path) -> None:
    with fork_rng(0):
        model = timm.create_model(NAME, num_classes=3, in_chans=1).train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(16, 1, 32, 32))
        torch.save(model.state_dict(), tmp_path / "net.pt")
    for index in range(3):
        (tmp_path / "val" / str(index)).mkdir(parents=True)
        Image.new("L", (40, 36), 80 * index).save(tmp_path / "val" / str(index) / "a.png")
    words = (NAME, "--checkpoint", tmp_path / "net.pt", "--num-classes", 3, "--model-kwargs", "in_chans=1")
    rest = (*SMALL, *KEPT, *GENERATOR, "--val", tmp_path / "val", "-o", tmp_path / "out")
    ended = adadfq("quantize", *words, *rest)
    assert ended.code == 0, ended.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["input_size"] == [1, 32, 32]
    assert len(report["facts"]["mean"]) == 1
    guessed = "not told, so taken: mean = (0.5,) (guess: the mean of timm's channels)"
    assert f"adadfq: warning: {guessed}" in ended.output
    assert report["warnings"][0].startswith(guessed)


def test_a_preset_given_here_comes_before_the_settings_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        '[network]\nname = "x"\ninput_size = [3, 32, 32]\n[settings]\noptimizer = "adam"\nsamples = 7\n'
    )
    made = plan({"preset": "paper_cifar", "temperature": 3.0, "img_size": 64}, file)
    assert made.settings == {"samples": 7, "temperature": 3.0}
    assert (made.network.input_size, made.network.img_size) == (None, 64)
    assert plan({}, file).settings == {"optimizer": "adam", "samples": 7}


def test_the_bare_program_shows_its_help() -> None:
    ended = adadfq()
    assert ended.code == 0
    assert ended.output.startswith("Usage:")
    assert "\n  quantize" in ended.output


def test_images_that_no_folder_can_hold_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adadfq_plugin.api.synthesize", lambda *_args, **_more: pytest.fail("it was run"))
    with torch.no_grad(), fork_rng(0):
        torch.save(timm.create_model(NAME, num_classes=10, in_chans=2).state_dict(), tmp_path / "net.pt")
    words = (NAME, "--checkpoint", tmp_path / "net.pt", "--num-classes", 10, "--model-kwargs", "in_chans=2")
    told = ("--mean", 0.5, 0.5, "--std", 0.5, 0.5, "--input-size", 2, 32, 32, *FACTS[8:])
    ended = adadfq("synthesize", *words, *told, "-o", tmp_path / "set")
    assert (ended.code, "PNG holds 1 or 3 channels, not 2" in ended.output) == (5, True), ended.output
