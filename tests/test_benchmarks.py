"""What the benchmarks ask of timm's registry."""

import runpy
from pathlib import Path

import torch

ARCHITECTURES = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "architectures.py"))


def test_a_model_is_built_for_a_smaller_image_where_its_size_is_fixed() -> None:
    model, size = ARCHITECTURES["smallest_model"]("vit_tiny_patch16_224")
    assert size == (3, 96, 96)
    assert model(torch.zeros(1, *size)).shape == (1, 1000)


def test_architectures_know_their_family() -> None:
    names = ARCHITECTURES["architectures"]()
    assert "resnet18" in names
    assert not [name for name in names if name.startswith("test_")]
    assert ARCHITECTURES["family_of"]("resnet18") == "resnet"
