"""What pip installs is the whole package, and what its metadata says is so."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from adadfq_plugin.cli import main

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "adadfq_plugin")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", target, source],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    (file,) = target.iterdir()
    return zipfile.Path(file)


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.Path) -> None:
    expected = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "adadfq_plugin").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    held = {name for name in wheel.root.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert "adadfq_plugin/py.typed" in held
    assert held == expected


def test_every_entry_point_leads_to_something() -> None:
    points = metadata.distribution("adadfq_plugin").entry_points
    groups = {point.group for point in points}
    assert groups == {"console_scripts", "adadfq_plugin.methods", "adadfq_plugin.backends"}
    for point in points:
        loaded = point.load()
        if point.group != "console_scripts":
            assert loaded.name == point.name


def test_one_version(wheel: zipfile.Path) -> None:
    (info,) = [entry for entry in wheel.iterdir() if entry.name.endswith(".dist-info")]
    built = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    said = CliRunner().invoke(main, ["--version"]).stdout
    assert built["Version"] == metadata.version("adadfq_plugin") == said.split()[-1]
    assert any(name.endswith("licenses/LICENSE") for name in wheel.root.namelist())
