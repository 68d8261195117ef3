"""Exact rewrites of a prepared FX model: padding in numbers, BatchNorm folded, and the way back to float."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from adadfq_plugin.backends.fx.graphs import is_quantizer, quantizer_nodes
from adadfq_plugin.backends.fx.layers import LAYERS, WITH_BATCH_NORM, WITH_RELU
from adadfq_plugin.sites import replace_module, sites

__all__ = ["float_copy", "fold_batch_norm", "number_padding"]


def number_padding(model: nn.Module) -> None:
    """Writes ``padding="same"`` and ``"valid"`` as numbers, in place: integer convolutions take nothing else.

    Where one side would get more than the other nothing is changed.
    """
    for module in model.modules():
        if not isinstance(module, nn.modules.conv._ConvNd) or not isinstance(module.padding, str):
            continue
        sides = [by * (size - 1) for by, size in zip(module.dilation, module.kernel_size, strict=True)]
        if module.padding == "valid":
            module.padding = (0,) * len(sides)
        elif not any(side % 2 for side in sides):
            module.padding = tuple(side // 2 for side in sides)


def _plain(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The float convolution or linear layer (without BatchNorm or ReLU) of a QAT module."""
    bias = module.bias is not None
    with torch.device("meta"):
        if kind is nn.Linear:
            plain = nn.Linear(module.in_features, module.out_features, bias)  # type: ignore[arg-type]
        else:
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            settings = {name: getattr(module, name) for name in names}
            plain = kind(**settings, bias=bias, padding_mode=module.padding_mode)  # type: ignore[assignment]
    weight, old_bias = cast(Tensor, module.weight), cast(Tensor, module.bias)
    plain.weight = nn.Parameter(weight.detach().clone())
    if bias:
        plain.bias = nn.Parameter(old_bias.detach().clone())
    return plain.train(module.training)


def fold_batch_norm(model: nn.Module) -> None:
    r"""Folds each fused BatchNorm of a QAT model into its convolution, in place, with running statistics.

    .. math:: w' = w\,\gamma / \sigma, \qquad b' = (b - \mu)\,\gamma / \sigma + \beta

    torch.ao divides by :math:`\gamma / \sigma` in its own fused modules; here a channel with
    :math:`\gamma = 0` is a channel of zeros.
    """
    for path, module in list(sites(model)):
        layer = WITH_BATCH_NORM.get(type(module))
        if layer is None:
            continue
        bn = module.bn
        args = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)  # type: ignore[union-attr]
        fuse = fuse_linear_bn_weights if layer.plain is nn.Linear else fuse_conv_bn_weights
        weight, bias = fuse(module.weight, module.bias, *args)  # type: ignore[arg-type]
        plain = _plain(module, layer.plain)
        learns = module.weight.requires_grad
        plain.weight = nn.Parameter(weight.detach(), requires_grad=learns)  # type: ignore[arg-type]
        plain.bias = nn.Parameter(bias.detach(), requires_grad=learns)  # type: ignore[arg-type]
        plain.qconfig = module.qconfig
        source, trained = plain, layer.trained
        if type(module) in WITH_RELU:
            source, trained = layer.relu(plain, nn.ReLU()), layer.trained_relu
            source.qconfig = module.qconfig
        folded = trained.from_float(source)
        folded.weight_fake_quant = module.weight_fake_quant
        folded.train(module.training)
        replace_module(model, path, folded)


def float_copy(prepared: GraphModule) -> GraphModule:
    """The network before it was prepared: same weights, BatchNorm apart, nothing observed or quantized."""
    model = copy.deepcopy(prepared)
    for node in quantizer_nodes(model):
        node.replace_all_uses_with(cast(Node, node.args[0]))
        model.graph.erase_node(node)
    for path, module in list(sites(model)):
        if not hasattr(module, "weight_fake_quant"):
            continue
        plain = _plain(module, next(kind for kind in LAYERS if isinstance(module, kind)))
        parts = [plain]
        if type(module) in WITH_BATCH_NORM:
            parts.append(module.bn)  # type: ignore[arg-type]
        if type(module) in WITH_RELU:
            parts.append(nn.ReLU())
        replace_module(model, path, parts[0] if len(parts) == 1 else nn.Sequential(*parts))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves shared ones out
            if child is not None and is_quantizer(child):
                delattr(parent, name)
    model.recompile()
    return model
