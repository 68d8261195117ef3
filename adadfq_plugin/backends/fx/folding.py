"""Exact rewrites of a prepared FX model: padding in numbers, BatchNorm folded, and the way back to float."""

from __future__ import annotations

import copy
from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from adadfq_plugin.backends.fx.graphs import free_name, is_quantizer, module_of, quantizer_nodes
from adadfq_plugin.backends.fx.layers import LAYERS, WITH_BATCH_NORM, WITH_RELU
from adadfq_plugin.sites import replace_module, sites

__all__ = ["float_copy", "fold_batch_norm", "fold_transposed", "number_padding"]


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


def fold_transposed(model: GraphModule) -> None:
    """Folds each BatchNorm behind a transposed convolution into it, in place: torch.ao can't do so while it trains.

    Args:
        model: traced, not prepared yet.
    """
    calls = Counter(str(node.target) for node in model.graph.nodes if node.op == "call_module")
    for node in list(model.graph.nodes):
        bn = module_of(model, node)
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm) or bn.running_mean is None:
            continue
        source = node.all_input_nodes[0]
        conv = module_of(model, source)
        once = calls[str(node.target)] == calls[str(source.target)] == len(source.users) == 1
        if not once or not isinstance(conv, nn.modules.conv._ConvTransposeNd) or conv.groups > 1:
            continue
        statistics = (bn.running_mean, cast(Tensor, bn.running_var), bn.eps, bn.weight, bn.bias)
        conv.weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, transpose=True)
        conv.bias = bias
        node.replace_all_uses_with(source)
        model.graph.erase_node(node)
    model.recompile()


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


def _keep_what_is_read(model: GraphModule) -> None:
    """Gives the model itself the weights that calls read of layers, in place: a layer may be replaced by another."""
    for node in model.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        if not hasattr(model.get_submodule(owner), "weight_fake_quant"):
            continue
        tensor = getattr(model.get_submodule(owner), name)
        node.target = free_name(model, f"{owner.replace('.', '_')}_{name}")
        if isinstance(tensor, nn.Parameter):
            model.register_parameter(node.target, tensor)
        else:
            model.register_buffer(node.target, tensor)


def fold_batch_norm(model: GraphModule) -> None:
    r"""Folds each fused BatchNorm of a QAT model into its convolution, in place, with running statistics.

    .. math:: w' = w\,\gamma / \sigma, \qquad b' = (b - \mu)\,\gamma / \sigma + \beta

    torch.ao divides by :math:`\gamma / \sigma` in its own fused modules; here a channel with
    :math:`\gamma = 0` is a channel of zeros.
    """
    _keep_what_is_read(model)
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
    _keep_what_is_read(model)
    for path, module in list(sites(model)):
        if not hasattr(module, "weight_fake_quant"):
            continue
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            replace_module(model, path, module.to_float())  # type: ignore[operator]
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
