"""BatchNorm in exported graphs: folded into the weights, absorbed, and given back as modules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from adadfq_plugin.backends.pt2e.fake_quantize import is_quantizer
from adadfq_plugin.backends.pt2e.graphs import (
    aten,
    free_name,
    is_constant,
    plain_copy,
    set_tensor,
    tensor_at,
    tidy,
    use_eval_mode,
    value_of,
)

__all__ = [
    "BN_EPS",
    "CONVOLUTIONS",
    "TRANSPOSED",
    "absorb_eps",
    "float_copy",
    "fold_batch_norm",
    "separate_layers",
]

BN_EPS = "adadfq_bn_eps"
"""Key of ``meta``: the epsilon that was absorbed into each running variance, by its name."""
EPS = 1e-5
"""The only epsilon that torchao's quantization-aware Conv+BatchNorm knows."""
BATCH_NORM = aten.batch_norm.default
CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv3d.default: nn.Conv3d,
    aten.conv1d.padding: nn.Conv1d,
    aten.conv2d.padding: nn.Conv2d,
    aten.conv3d.padding: nn.Conv3d,
}
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LINEAR = aten.linear.default
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class NormedLayer:
    """A convolution or linear layer and the BatchNorm behind it.

    Args:
        layer: the call of the layer.
        norm: the call of the BatchNorm.
        weight: the layer's own weight.
        bias: the layer's own bias, or None.
        fused: torchao's quantization-aware form: the weight is scaled by gamma over sigma, the output unscaled.
    """

    layer: Node
    norm: Node
    weight: Node
    bias: Node | None
    fused: bool


def _quantizer(model: GraphModule, node: Any) -> bool:
    if not isinstance(node, Node) or node.op != "call_module":
        return False
    return is_quantizer(model.get_submodule(str(node.target)))


def _unquantized(model: GraphModule, node: Any) -> Any:
    while _quantizer(model, node):
        node = node.args[0]
    return node


def _only_scales(node: Any) -> bool:
    """Whether a value is a constant by which torchao's fused form multiplies, divides or shifts."""
    return isinstance(node, Node) and node.target is aten.reshape.default and is_constant(node)


def _normed_layers(model: GraphModule) -> Iterator[NormedLayer]:
    for norm in model.graph.nodes:
        if norm.target is not BATCH_NORM or not all(map(is_constant, norm.args[1:5])):
            continue
        if norm.args[3] is None:  # without running statistics nothing can be folded
            continue
        x, bias, fused = norm.args[0], None, False
        if x.target is aten.add.Tensor and _only_scales(x.args[1]) and x.args[0].target is aten.div.Tensor:
            bias, x = x.args[1].args[0], x.args[0]
        if x.target is aten.div.Tensor and _only_scales(x.args[1]):
            fused, x = True, x.args[0]
        if x.target not in CONVOLUTIONS and x.target not in TRANSPOSED and x.target is not LINEAR:
            continue
        weight = _unquantized(model, x.args[1])
        if fused:
            weight = weight.args[0]
        else:
            bias = x.args[2] if len(x.args) > 2 else None
        plain = isinstance(weight, Node) and weight.op == "get_attr"
        bias_is_plain = bias is None or (isinstance(bias, Node) and bias.op == "get_attr")
        in_two_dimensions = x.target is not LINEAR or x.meta["val"].ndim == 2
        alone = fused or len(x.users) == 1
        if plain and bias_is_plain and bool(in_two_dimensions) and alone:
            yield NormedLayer(x, norm, weight, bias, fused)


def _scaled(layer: Node, weight: Tensor, scale: Tensor) -> Tensor:
    """A layer's weight with each output channel multiplied by a number of its own."""
    if layer.target not in TRANSPOSED:
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    # (in, out / groups, ...): the groups of the input channels have output channels of their own
    columns = weight.shape[1]
    groups = scale.view(-1, 1, columns)
    factors = groups.expand(-1, weight.shape[0] // len(groups), columns).reshape(-1, columns)
    return weight * factors.view(*factors.shape, *[1] * (weight.ndim - 2))


def _affine(model: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    r"""Scale :math:`\gamma / \sigma` and shift :math:`\beta - \mu\,\gamma / \sigma` of a BatchNorm in eval mode."""
    gamma, beta, mean, variance = (value_of(model, each) for each in norm.args[1:5])
    scale = (variance + norm.args[7]).rsqrt() * (1 if gamma is None else gamma)
    return scale, (0 if beta is None else beta) - mean * scale


def fold_batch_norm(model: GraphModule) -> None:
    r"""Folds each BatchNorm behind a convolution or linear layer into it, in place, with running statistics.

    .. math:: w' = w\,\gamma / \sigma, \qquad b' = (b - \mu)\,\gamma / \sigma + \beta

    torchao's fused form divides by :math:`\gamma / \sigma`; here a channel with :math:`\gamma = 0` is a channel
    of zeros. A BatchNorm that stands elsewhere becomes a multiplication and an addition, and one without running
    statistics, as it standardises weights, its arithmetic: where torchao's convert finds one, it searches the graph
    for patterns of its own, for ten seconds and more.
    """
    graph = model.graph
    for found in list(_normed_layers(model)):
        layer, norm = found.layer, found.norm
        weight = tensor_at(model, str(found.weight.target))
        with torch.no_grad():
            scale, shift = _affine(model, norm)
            weight_ = _scaled(layer, weight, scale)
            bias_ = shift if found.bias is None else value_of(model, found.bias) * scale + shift
        path = str(found.weight.target)
        stem = path.removesuffix("weight")
        trained = weight.requires_grad
        with graph.inserting_before(layer):
            new_weight = graph.get_attr(set_tensor(model, path, weight_.detach(), trained))
            new_bias = graph.get_attr(set_tensor(model, f"{stem}bias", bias_.detach(), trained))
        new_weight.meta, new_bias.meta = dict(found.weight.meta), {}
        _replace_weight(model, layer, new_weight)
        old_bias = layer.args[2] if len(layer.args) > 2 else None
        if _quantizer(model, old_bias):
            old_bias.update_arg(0, new_bias)  # type: ignore[union-attr]
            layer.args[2].prepend(new_bias)  # type: ignore[union-attr]
        else:
            layer.args = (*layer.args[:2], new_bias, *layer.args[3:])
        layer.meta = {**layer.meta, "val": norm.meta.get("val", layer.meta.get("val"))}
        norm.replace_all_uses_with(layer)
        graph.erase_node(norm)
    _make_affine(model)
    for norm in list(graph.nodes):
        if norm.target is BATCH_NORM and norm.args[3] is None:
            _spell_out(graph, norm)
    tidy(model)


def _spell_out(graph: Graph, norm: Node) -> None:
    value, *affine = norm.args[:3]
    places = [each for each in range(norm.meta["val"].ndim) if each != 1]
    shape = [1 if each in places else -1 for each in range(norm.meta["val"].ndim)]
    call = graph.call_function
    with graph.inserting_before(norm):
        centred = call(aten.sub.Tensor, (value, call(aten.mean.dim, (value, places, True))))
        variance = call(aten.mean.dim, (call(aten.mul.Tensor, (centred, centred)), places, True))
        scale = call(aten.rsqrt.default, (call(aten.add.Scalar, (variance, norm.args[7])),))
        result = call(aten.mul.Tensor, (centred, scale))
        for parameter, change in zip(affine, (aten.mul.Tensor, aten.add.Tensor), strict=True):
            if parameter is not None:
                result = call(change, (result, call(aten.reshape.default, (parameter, shape))))
    result.meta = dict(norm.meta)
    norm.replace_all_uses_with(result)
    graph.erase_node(norm)


def _make_affine(model: GraphModule) -> None:
    graph = model.graph
    for norm in list(graph.nodes):
        if norm.target is not BATCH_NORM or norm.args[3] is None or not all(map(is_constant, norm.args[1:5])):
            continue
        with torch.no_grad():
            scale, shift = _affine(model, norm)
        shape = (-1, *[1] * (norm.meta["val"].ndim - 2))
        path = str(norm.args[3].target).removesuffix("running_mean")
        value, gamma = norm.args[0], norm.args[1]
        trained = gamma is not None and value_of(model, gamma).requires_grad
        with graph.inserting_before(norm):
            for name, tensor, call in (("scale", scale, aten.mul.Tensor), ("shift", shift, aten.add.Tensor)):
                stored = graph.get_attr(set_tensor(model, f"{path}{name}", tensor.view(shape), trained))
                value = graph.call_function(call, (value, stored))
                value.meta = {"val": norm.meta.get("val")}
        norm.replace_all_uses_with(value)
        graph.erase_node(norm)


def _replace_weight(model: GraphModule, layer: Node, weight: Node) -> None:
    """Puts ``weight`` where the chain of quantizers in front of the layer's weight begins."""
    place: Any = layer.args[1]
    user = layer
    chain: list[Node] = []
    while _quantizer(model, place):
        chain.append(place)
        place, user = place.args[0], place
    if not chain:
        layer.update_arg(1, weight)
        return
    user.update_arg(0, weight)
    for quantizer in reversed(chain):  # they may stand before the new parameter
        layer.prepend(quantizer)


def separate_layers(model: GraphModule) -> None:
    """Gives each of several layers that share a weight one of its own where a BatchNorm stands behind any; in place.

    torchao merges that layer with its BatchNorm, and forgets the quantizer of the shared weight for the others.
    """
    sharing: dict[Node, list[Node]] = {}
    for node in model.graph.nodes:
        if node.target in (*CONVOLUTIONS, *TRANSPOSED, LINEAR) and node.args[1].op == "get_attr":
            sharing.setdefault(node.args[1], []).append(node)
    for layers in sharing.values():
        if not any(user.target is BATCH_NORM for layer in layers for user in layer.users):
            continue
        for layer, place in itertools.product(layers[1:], (1, 2)):
            shared: Any = layer.args[place] if len(layer.args) > place else None
            if shared is not None and shared.op == "get_attr":
                tensor = tensor_at(model, str(shared.target))
                path = set_tensor(model, str(shared.target), tensor.detach().clone(), tensor.requires_grad)
                with model.graph.inserting_before(layer):
                    own = model.graph.get_attr(path)
                own.meta = dict(shared.meta)
                layer.update_arg(place, own)
    model.recompile()


def absorb_eps(model: GraphModule) -> None:
    r"""Gives every BatchNorm the epsilon that torchao knows, exactly: :math:`\sigma^2` grows by the difference.

    In place; ``meta[BN_EPS]`` keeps the old ones.
    """
    absorbed: dict[str, float] = {}
    for norm in model.graph.nodes:
        if norm.target is not BATCH_NORM or norm.args[4] is None or norm.args[7] == EPS:
            continue
        path, eps = str(norm.args[4].target), float(norm.args[7])
        if path not in absorbed:  # a layer may be called twice
            with torch.no_grad():
                tensor_at(model, path).add_(eps - EPS)
            absorbed[path] = eps
        norm.update_arg(7, EPS)
    model.meta[BN_EPS] = absorbed
    model.recompile()


def float_copy(prepared: GraphModule) -> GraphModule:
    """The network before it was prepared, with modules: nothing observed or quantized, BatchNorm apart.

    Convolutions, linear layers and BatchNorm are ``torch.nn`` modules again, for all that looks for these.
    """
    model = plain_copy(prepared)
    use_eval_mode(model)
    graph = model.graph
    for node in list(graph.nodes):
        if _quantizer(model, node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for found in list(_normed_layers(model)):
        if found.fused:
            found.layer.args = (found.layer.args[0], found.weight, found.bias, *found.layer.args[3:])
            found.norm.update_arg(0, found.layer)
    absorbed = model.meta.pop(BN_EPS, {})
    for node in list(graph.nodes):
        module = _as_module(model, node, absorbed)
        if module is not None:
            name = free_name(model, f"{node.name}_module")  # the user may have one of that name
            model.add_module(name, module.eval())
            with graph.inserting_before(node):
                call = graph.call_module(name, (node.args[0],))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    return tidy(model)


def _as_module(model: GraphModule, node: Node, absorbed: dict[str, float]) -> nn.Module | None:
    if node.target is BATCH_NORM:
        return _norm_module(model, node, absorbed)
    if node.target not in CONVOLUTIONS and node.target is not LINEAR:
        return None
    tensors = node.args[1:3] if len(node.args) > 2 else (node.args[1], None)
    if not all(each is None or (isinstance(each, Node) and each.op == "get_attr") for each in tensors):
        return None
    weight, bias = (value_of(model, each) for each in tensors)
    made: nn.Module
    if node.target is LINEAR:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        names = ("stride", "padding", "dilation", "groups")
        values = dict(zip(names, node.args[3:], strict=False))
        settings: dict[str, Any] = {
            name: tuple(each) if isinstance(each, list) else each for name, each in values.items()
        }
        groups = settings.get("groups", 1)
        kind: Any = CONVOLUTIONS[node.target]
        made = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            bias=bias is not None,
            device="meta",
            **settings,
        )
    return _with(made, weight=weight, bias=bias)


def _norm_module(model: GraphModule, node: Node, absorbed: dict[str, float]) -> nn.Module | None:
    if node.args[3] is None or not all(map(is_constant, node.args[1:5])):
        return None
    gamma, beta, mean, variance = (value_of(model, each) for each in node.args[1:5])
    ndim = node.meta["val"].ndim
    eps = float(node.args[7])  # type: ignore[arg-type]
    path = str(node.args[4].target)  # type: ignore[union-attr]
    if path in absorbed and eps == EPS:
        eps = absorbed[path]
        variance = variance - (eps - EPS)
    made = NORMS[ndim](mean.numel(), eps=eps, affine=gamma is not None, device="meta")
    made.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return _with(made, running_mean=mean, running_var=variance, weight=gamma, bias=beta)


def _with(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, value in tensors.items():
        if value is None:
            continue
        if name in module._buffers:
            setattr(module, name, value.detach().clone())
        else:
            setattr(module, name, nn.Parameter(value.detach().clone()))
    return module
