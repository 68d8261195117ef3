"""A third party's method, in a distribution of its own, installed by pip as a user would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

PLUGINS = Path(__file__).parent / "plugin"

CALIBRATE = """
    import json, sys
    import torch
    from torch import nn
    from torch.ao.quantization import QConfig, QConfigMapping, get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    import adadfq_plugin
    from adadfq_plugin.errors import AdaDFQError

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        model(torch.randn(64, 3, 8, 8))
    example = torch.randn(5, 3, 8, 8)
    expected = model.eval()(example)
    prepared = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (example,))
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    try:
        result = adadfq_plugin.calibrate(prepared, input_size=(3, 8, 8), method=sys.argv[1], seed=3)
    except AdaDFQError as error:
        same = all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
        print(json.dumps({"error": type(error).__name__, "message": str(error), "untouched": same}))
    else:
        converted = convert_fx(prepared.eval())
        error = (converted(example) - expected).detach()
        print(json.dumps({
            "method": result.method,
            "provenance": result.samples.provenance["method"],
            "samples": len(result.samples),
            "notes": list(result.notes),
            "relative_error": float(error.std() / expected.std()),
            "integer": sum("quantized" in type(module).__module__ for module in converted.modules()),
        }))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions, built and installed by pip, without the network."""
    target = tmp_path_factory.mktemp("site")
    sources = tmp_path_factory.mktemp("plugin") / "source"
    shutil.copytree(PLUGINS, sources, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target)]
        + [str(sources / name) for name in ("uniform", "broken")],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return target


def run(*arguments: str, site: Path | None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH="" if site is None else str(site))
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def methods(site: Path | None) -> subprocess.CompletedProcess[str]:
    return run("-c", "from adadfq_plugin.cli import main; main()", "methods", site=site)


def calibrate(method: str, site: Path | None) -> dict[str, Any]:
    done = run("-c", textwrap.dedent(CALIBRATE), method, site=site)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_methods_lists_the_plugin_beside_our_own_and_names_the_broken_one(site: Path) -> None:
    done = methods(site)
    assert done.returncode == 0, done.stderr
    for expected in ("adadfq", "bn_stats", "noise", "uniform_noise", "adadfq-uniform-noise", "adadfq-broken"):
        assert expected in done.stdout
    assert "ranges from images of uniform noise" in done.stdout
    assert "needs a package that is not installed" in done.stdout + done.stderr


def test_methods_lists_no_plugin_that_is_not_installed() -> None:
    done = methods(None)
    assert done.returncode == 0, done.stderr
    assert "bn_stats" in done.stdout
    assert "uniform_noise" not in done.stdout
    assert "broken" not in done.stdout


def test_calibrate_runs_the_plugin_by_name(site: Path) -> None:
    answer = calibrate("uniform_noise", site)
    assert answer["method"] == answer["provenance"] == "uniform_noise"
    assert answer["samples"] == 256
    assert "ranges seen on 256 images of uniform noise" in answer["notes"]
    assert answer["integer"] >= 2
    assert answer["relative_error"] < 0.1


def test_asking_for_the_broken_one_names_its_distribution_and_touches_nothing(site: Path) -> None:
    answer = calibrate("broken", site)
    assert answer["error"] == "BrokenPluginError"
    assert "adadfq-broken" in answer["message"]
    assert "needs a package that is not installed" in answer["message"]
    assert answer["untouched"]


def test_an_unknown_method_is_answered_with_the_nearest_name(site: Path) -> None:
    answer = calibrate("uniform_noize", site)
    assert answer["error"] == "UnknownNameError"
    assert "'uniform_noise'" in answer["message"]
    assert answer["untouched"]
