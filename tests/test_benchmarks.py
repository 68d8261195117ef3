"""What the benchmarks ask of timm's registry, and where they keep their rows."""

import runpy
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ARCHITECTURES = runpy.run_path(str(BENCHMARKS / "architectures.py"))


def test_a_model_is_built_for_a_smaller_image_where_its_size_is_fixed() -> None:
    model, size = ARCHITECTURES["smallest_model"]("vit_tiny_patch16_224")
    assert size == (3, 96, 96)
    assert model(torch.zeros(1, *size)).shape == (1, 1000)


def test_architectures_know_their_family() -> None:
    names = ARCHITECTURES["architectures"]()
    assert "resnet18" in names
    assert not [name for name in names if name.startswith("test_")]
    assert ARCHITECTURES["family_of"]("resnet18") == "resnet"


def test_a_file_that_is_to_be_merged_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    read = runpy.run_path(str(BENCHMARKS / "tables.py"))["read"]
    assert read(tmp_path / "new.json") == {}
    with pytest.raises(FileNotFoundError, match=r"typo\.json"):
        read(tmp_path / "new.json", tmp_path / "typo.json")
