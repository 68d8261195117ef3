"""A prepared PT2E model, opened as a private copy: observed, trained, written back, converted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from adadfq_plugin.backends.pt2e.fake_quantize import LearnedFakeQuantize, is_quantizer, replaceable
from adadfq_plugin.backends.pt2e.folding import TRANSPOSED, float_copy, fold_batch_norm
from adadfq_plugin.backends.pt2e.graphs import (
    is_constant,
    plain_copy,
    tensor_at,
    use_eval_mode,
    use_no_mutation,
)
from adadfq_plugin.captures import capture_outputs
from adadfq_plugin.contracts import Phase
from adadfq_plugin.errors import ModelError
from adadfq_plugin.facts import SIZE
from adadfq_plugin.sites import replace_module, sites, take_over
from adadfq_plugin.switches import has_own_rule, own_rules_note, refuse_dynamic, switched

__all__ = ["ATTRIBUTES", "NARROWED", "PT2EPrepared", "input_size"]

ATTRIBUTES = "_observed_graph_module_attrs"
"""Key of ``meta`` for torchao's notes on a prepared model."""
NARROWED = "adadfq_narrowed"
"""Key of ``meta`` for the number of layers whose weights got 7 bits where 8 were asked for."""
COMPILE = (
    "the converted network computes in float what it has quantized, until it is compiled: "
    "adadfq_plugin.backends.pt2e.compiled has the integer kernels"
)


def input_size(model: GraphModule) -> tuple[Any, ...]:
    """Shape of the input that the graph was exported for; a batch size that may vary is no number.

    Raises:
        ModelError: more or less than one input.
    """
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ModelError(f"the exported model has {len(inputs)} inputs; one batch of images is needed")
    value = inputs[0].meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_boundary(node: Any) -> bool:
    """Whether a value is a weight or the network's input."""
    return is_constant(node) or bool(node.op == "placeholder")


def _quantized_weights(model: GraphModule) -> Iterator[tuple[nn.Parameter, LearnedFakeQuantize, Node]]:
    """Each quantized weight with its quantizer and a layer that reads it; once for each such layer."""
    for node in model.graph.nodes:
        quantizer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(quantizer, LearnedFakeQuantize) or node.args[0].op != "get_attr":
            continue
        weight = tensor_at(model, str(node.args[0].target))
        if isinstance(weight, nn.Parameter):
            for layer in node.users:
                yield weight, quantizer, layer


class PT2EPrepared:
    """The private copy of one prepared model; see :class:`adadfq_plugin.contracts.Prepared`.

    Args:
        original: a model of ``prepare_qat_pt2e`` or ``prepare_pt2e``; touched by :meth:`commit` alone.
    """

    def __init__(self, original: GraphModule) -> None:
        self._original = original
        narrowed = original.meta.get(NARROWED, 0)
        few = f"{narrowed} layers have 7-bit weights: kernels of this CPU (oneDNN) overflow on 8"
        self.notes: list[str] = [few, COMPILE] if narrowed else [COMPILE]
        self.trainable = bool(original.meta[ATTRIBUTES].is_qat)
        self.module: GraphModule = plain_copy(original)
        self._refuse_nothing_quantized()
        refuse_dynamic(self.module.named_modules())
        use_eval_mode(self.module)
        fold_batch_norm(self.module)
        use_no_mutation(self.module.graph)
        self.module.recompile()
        self._learn_quantizers()
        self._refuse_fixed_batch()
        shape = input_size(self.module)
        if len(shape) == 4:
            self.module.meta[SIZE] = tuple(int(extent) for extent in shape[1:])
        asked = [
            8 if narrowed and quantizer.per_channel else quantizer.bits for quantizer in self._quantizers()
        ]
        self.lowest_bits = min(asked, default=8)
        """Narrowest weight or activation that was asked for, in bits."""

    # -- what was prepared -------------------------------------------------------------------------

    def _refuse_nothing_quantized(self) -> None:
        if not any(map(is_quantizer, self.module.modules())):
            raise ModelError(
                "the prepared model quantizes nothing: its Quantizer annotates none of its operators; prepare it "
                "with a Quantizer for convolutions and linear layers"
            )

    def _refuse_fixed_batch(self) -> None:
        """Graphs whose batch size is a constant somewhere can't be calibrated with batches of any other."""
        shape = input_size(self.module)
        if not shape:
            return
        batch = shape[0] + 1 if isinstance(shape[0], int) else 3  # the example has two where it may vary
        like = next(self.module.parameters(), torch.empty(0))  # another dtype is refused by its name later
        try:
            with torch.no_grad(), self.phase(Phase.FLOAT):
                output = self.module(like.new_zeros(batch, *shape[1:]))
            takes_any = len(output) == batch
        except RuntimeError:
            takes_any = False
        if not takes_any:
            raise ModelError(
                f"the exported model takes batches of exactly {shape[0]} images: export it with an example of at least "
                "2 images and dynamic_shapes=({0: torch.export.Dim.AUTO},), and read the size of a batch in forward as "
                "x.shape[0], for torch.export makes a constant of len(x)"
            )

    def _learn_quantizers(self) -> None:
        learned: dict[int, LearnedFakeQuantize] = {}
        own: set[str] = set()
        found = list(sites(self.module))
        inner = {id(each) for _, module in found if is_quantizer(module) for each in module.children()}
        for path, module in found:
            if id(module) in inner or not replaceable(module):
                continue
            if self.trainable and has_own_rule(module, "torchao"):
                own.add(type(module).__name__)
            else:
                if id(module) not in learned:
                    make = LearnedFakeQuantize.like if self.trainable else LearnedFakeQuantize.around
                    learned[id(module)] = make(module)
                replace_module(self.module, path, learned[id(module)])
        self.notes += own_rules_note(own)
        for _, module in found:  # ranges derived from others, as of a bias
            sources = getattr(module, "obs_or_fqs", None)
            if sources is not None:
                module.obs_or_fqs = [learned.get(id(each), each) for each in sources]  # type: ignore[assignment]

    def _quantizers(self) -> list[LearnedFakeQuantize]:
        return [module for module in self.module.modules() if isinstance(module, LearnedFakeQuantize)]

    # -- phases ------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Switches observers and fake quantizers for the length of the ``with``."""
        observe, quantize = phase is Phase.OBSERVE, phase in (Phase.TRAIN, Phase.EVALUATE)
        modules = list(filter(is_quantizer, self.module.modules()))
        quantizers = [module for module in modules if isinstance(module, FakeQuantizeBase)]
        observers = [module for module in modules if not isinstance(module, FakeQuantizeBase)]
        with switched(quantizers, observers, observe=observe, quantize=quantize):
            yield

    def reference(self) -> PT2EPrepared:
        """A copy with the weights of now."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module)
        return twin

    @contextmanager
    def activations(self) -> Iterator[dict[str, Tensor]]:
        """The outputs of the activation quantizers, but for the one of the network's input."""
        watched: dict[nn.Module, str] = {}
        for node in self.module.graph.nodes:
            module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, LearnedFakeQuantize) and not _is_boundary(node.args[0]):
                watched.setdefault(module, str(node.target))
        with capture_outputs({name: module for module, name in watched.items()}) as seen:
            yield seen

    def set_ranges(self, how: str = "mse") -> None:
        """Turns what OBSERVE has seen into scales and zero points; the user's own observers decide for themselves."""
        for quantizer in self._quantizers():
            if quantizer.observer is not None:
                quantizer.take()
            elif how == "mse":
                quantizer.search()
            else:
                quantizer.reset()

    def weights(self) -> Sequence[nn.Parameter]:
        """Weights and biases of the network that the user has not frozen."""
        steps = {id(step) for step in self.steps()}
        return [each for each in self.module.parameters() if each.requires_grad and id(each) not in steps]

    def weight_units(self) -> Sequence[Tensor]:
        """The step of each weight's channel; a bias takes that of its weight times the root of the fan-in."""
        units: dict[int, Tensor] = {}
        for weight, quantizer, layer in _quantized_weights(self.module):
            scale = quantizer.scale.detach()
            units[id(weight)] = quantizer.along(scale, weight.ndim)
            bias = layer.args[2] if len(layer.args) > 2 else None
            if isinstance(bias, Node) and bias.op == "get_attr":
                found = tensor_at(self.module, str(bias.target))
                of_outputs = quantizer.channel_axis(weight.ndim) == int(layer.target in TRANSPOSED)
                # the groups of a transposed convolution share their channels' steps
                own = scale.repeat(len(found) // len(scale)) if of_outputs else scale.mean()
                units[id(found)] = own * (weight.numel() / len(found)) ** 0.5
        # what is not quantized (an affine BatchNorm) moves by the rate times a hundredth of its size
        return [units.get(id(each), each.detach().abs().mean() / 100) for each in self.weights()]

    def steps(self) -> Sequence[nn.Parameter]:
        """Logarithms of the step sizes."""
        return [quantizer.log_scale for quantizer in self._quantizers()]

    def float_model(self) -> nn.Module:
        """The network before it was prepared, with BatchNorm as modules."""
        model = float_copy(self._original)
        model.meta.update({key: self.module.meta[key] for key in (SIZE,) if key in self.module.meta})
        for name in ("pretrained_cfg", "num_classes"):
            if hasattr(self._original, name):
                setattr(model, name, copy.deepcopy(getattr(self._original, name)))
        return model

    # -- the way out -------------------------------------------------------------------------------

    def finish(self) -> GraphModule:
        """A copy that is ready for ``convert_pt2e``, with the user's own observers where they decided."""
        work = copy.deepcopy(self.module)
        for weight, quantizer, _ in _quantized_weights(work):
            if quantizer.observer is None:
                weight.data.copy_(quantizer.settled(weight))
        observers: dict[int, nn.Module] = {}
        for path, module in list(sites(work)):
            if isinstance(module, LearnedFakeQuantize):
                if module.observer is not None:
                    observers[id(module)] = module.observer
                    replace_module(work, path, module.observer)
                module.log_scale.requires_grad_(False)
            if isinstance(module, FakeQuantizeBase):
                module.disable_observer()
                module.enable_fake_quant()
        for module in work.modules():
            sources = getattr(module, "obs_or_fqs", None)
            if sources is not None:
                module.obs_or_fqs = [observers.get(id(each), each) for each in sources]  # type: ignore[assignment]
        work.meta = dict(self._original.meta)
        return work

    def commit(self) -> None:
        """Writes the calibrated state into the user's model, in place."""
        take_over(self._original, self.finish())

    def convert(self) -> nn.Module:
        """The network that ``convert_pt2e`` makes of the calibrated state."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return cast(nn.Module, convert_pt2e(self.finish().cpu()))
