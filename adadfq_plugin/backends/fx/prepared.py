"""A prepared FX model, opened as a private copy: observed, trained, written back, converted."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase, FixedQParamsFakeQuantize
from torch.ao.quantization.observer import ObserverBase
from torch.ao.quantization.quantize_fx import convert_fx
from torch.fx import GraphModule, Node

from adadfq_plugin.backends.fx.clamps import absorb_clamps
from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.finishing import (
    average_channels_last,
    clamp_computed_weights,
    narrow_observed_weight,
    saturate_activations,
    settle_weights,
    weighted,
)
from adadfq_plugin.backends.fx.folding import float_copy, fold_batch_norm, number_padding
from adadfq_plugin.backends.fx.functional_layers import lift_functions
from adadfq_plugin.backends.fx.graphs import (
    ATTRIBUTES,
    INTEGER,
    POOLINGS,
    called,
    is_quantizer,
    module_of,
    prepared_attributes,
    quantizer_nodes,
    separate_calls,
)
from adadfq_plugin.backends.fx.inference import as_inference
from adadfq_plugin.backends.fx.kernels import GROUPS, adds_in_16_bits, has_vnni, using_engine
from adadfq_plugin.backends.fx.layers import FUNCTIONS
from adadfq_plugin.backends.fx.levels import averages_in_float, is_average, is_interpolation, requantize
from adadfq_plugin.captures import argument, capture_outputs
from adadfq_plugin.contracts import Phase
from adadfq_plugin.errors import ModelError
from adadfq_plugin.hooks import module_modes
from adadfq_plugin.ranges import levels_that_fit
from adadfq_plugin.sites import replace_module, sites, take_over
from adadfq_plugin.switches import has_own_rule, own_rules_note, refuse_dynamic, switched

__all__ = ["ENGINE", "IN_FLOAT", "FXPrepared", "copies_note"]

ENGINE = "adadfq_engine"
"""Key of ``meta`` for the engine that a model was prepared for; without it, torch's current one."""
CALIBRATED = "adadfq_calibrated"
"""Key of ``meta`` for models that :meth:`FXPrepared.commit` has written."""
IN_FLOAT = "adadfq_in_float"
"""Key of ``meta`` for sentences about what was left in float."""
SUMS = (operator.add, torch.add, "add")


def copies_note(model: nn.Module, copies: Iterable[str]) -> list[str]:
    """A sentence about layers that are called again, where there are any among the copied modules."""
    parameters = (model.get_submodule(name).parameters() for name in copies)
    count = sum(
        any(each.ndim > 1 for each in own) for own in parameters
    )  # those of normalisation are vectors
    what = "calls of layers have copies" if count > 1 else "call of a layer has a copy"
    return [f"{count} repeated {what} of the weights: an integer layer has one scale of its output"] * bool(
        count
    )


def _refuse_integers_outside(prepared: GraphModule) -> None:
    """Refuses a model that takes integers or gives them: it is calibrated on images, by its logits."""
    custom = prepared_attributes(prepared).prepare_custom_config
    for name in ("input_quantized_indexes", "output_quantized_indexes"):
        if getattr(custom, name):
            raise ModelError(
                f"the model was prepared with set_{name}({getattr(custom, name)}), so that it does not map images to "
                "logits: prepare it without"
            )


class FXPrepared:
    """The private copy of one prepared model; see :class:`adadfq_plugin.contracts.Prepared`.

    Args:
        original: a model of ``prepare_qat_fx`` or ``prepare_fx``; touched by :meth:`commit` alone.
        requantized: whether tensors are brought to the levels of what they are concatenated with.
    """

    def __init__(self, original: GraphModule, *, requantized: bool = True) -> None:
        modules = original.named_modules()
        refuse_dynamic((name, each) for name, each in modules if isinstance(each, FakeQuantizeBase))
        self._original = original
        self._calibrated = bool(original.meta.get(CALIBRATED))
        self.notes: list[str] = list(original.meta.get(IN_FLOAT, ()))
        self.engine: str = original.meta.get(ENGINE, torch.backends.quantized.engine)
        _refuse_integers_outside(original)
        self.module: GraphModule = copy.deepcopy(original)
        as_inference(self.module)
        lift_functions(self.module)
        number_padding(self.module)
        self.trainable = bool(prepared_attributes(original).is_qat)
        quantizers = set(quantizer_nodes(self.module))
        # torch.ao keeps one scale of the output in an integer module, however many quantizers stand behind its calls
        self.origins = separate_calls(
            self.module, lambda node, module: not (quantizers.isdisjoint(node.users) or is_quantizer(module))
        )
        """What module each copy was made of, by name; each call has a module of its own."""
        self.notes += copies_note(self.module, self.origins)
        fold_batch_norm(self.module)
        averages_in_float(self.module)
        if requantized:
            requantize(self.module)
        self.lowest_bits = 8
        """Narrowest weight or activation that was asked for, in bits; 8 where torch.ao's observers decide."""
        if self.trainable:
            self._learn_quantizers()
            absorb_clamps(self.module)
            self._note_rounded_terms()
        self._widen_boundary()
        if self.trainable:
            self.lowest_bits = min((quantizer.bits for quantizer in self._quantizers()), default=8)
        self._mark_averages()
        if not self._calibrated:  # its ranges go with its levels
            self._fit_kernels()
        self._refuse_nothing_quantized()

    # -- what was prepared -------------------------------------------------------------------------

    def _learn_quantizers(self) -> None:
        learned: dict[int, LearnedFakeQuantize] = {}
        own: set[str] = set()
        for path, module in list(sites(self.module)):
            if not isinstance(module, FakeQuantizeBase) or isinstance(module, FixedQParamsFakeQuantize):
                continue
            embeds = getattr(module, "qscheme", None) is torch.per_channel_affine_float_qparams
            if getattr(module, "is_dynamic", False) or module.dtype not in INTEGER or embeds:
                continue
            if has_own_rule(module, "torch.ao"):
                own.add(type(module).__name__)
                continue
            if id(module) not in learned:
                learned[id(module)] = LearnedFakeQuantize.like(module)
            replace_module(self.module, path, learned[id(module)])
        self.notes += own_rules_note(own)

    def _quantizers(self) -> list[LearnedFakeQuantize]:
        return [module for module in self.module.modules() if isinstance(module, LearnedFakeQuantize)]

    def _quantizer_of(self, node: Node) -> LearnedFakeQuantize | None:
        module = module_of(self.module, node)
        return module if isinstance(module, LearnedFakeQuantize) else None

    def _widen_boundary(self) -> None:
        """The network's input and logits take their own number of levels where the qconfig says so."""
        for node in quantizer_nodes(self.module):
            quantizer = self._quantizer_of(node)
            if quantizer is None or quantizer.boundary_max is None:
                continue
            source = node.args[0]
            at_input = isinstance(source, Node) and source.op == "placeholder"
            if at_input or any(user.op == "output" for user in node.users):
                quantizer.set_levels(quantizer.quant_min, quantizer.boundary_max)

    def _fit_kernels(self) -> None:
        """Weights of fewer levels where the kernels of this CPU would overflow.

        The weights give way, not the activations: they are per channel, and need no clamp in the kernel.
        """
        narrowed = 0
        for node, largest in self._added_in_16_bits():
            weight = self._weight_quantizer(node)
            if weight is None:  # no layer, rules of its own, or an observer that comes with the conversion
                layer = module_of(self.module, node)
                if not hasattr(layer, "weight_fake_quant"):
                    narrowed += narrow_observed_weight(layer, largest)
                continue
            levels = weight.quant_min, weight.quant_max
            fitting = levels_that_fit(*levels, largest)
            if fitting != levels:
                weight.set_levels(*fitting)
                narrowed += 1
        if narrowed:
            self.notes.append(
                f"{narrowed} layers have 7-bit weights: kernels of this CPU ({', '.join(sorted(self.engines))}) "
                "overflow on 8"
            )

    @property
    def engines(self) -> set[str]:
        """Where the network will run: a saved model is packed for the reader's engine, x86 unless told otherwise."""
        readers = {"x86"} if self.engine in GROUPS else set()
        return {self.engine} | readers & set(torch.backends.quantized.supported_engines)

    def _added_in_16_bits(self) -> Iterator[tuple[Node, int]]:
        """Readers of activations whose kernel adds products in pairs in 16 bits, and the activations' highest level."""
        vnni = has_vnni()
        for node in quantizer_nodes(self.module):
            quantizer: Any = module_of(self.module, node)
            highest = getattr(quantizer, "quant_max", None)  # observers that only note a dtype have none
            if quantizer.dtype != torch.quint8 or getattr(quantizer, "is_dynamic", False) or highest is None:
                continue
            for user in node.users:
                groups = int(getattr(weighted(module_of(self.module, user)), "groups", 1))
                if any(adds_in_16_bits(engine, vnni, groups) for engine in self.engines):
                    yield user, highest

    def _mark_averages(self) -> None:
        for node in quantizer_nodes(self.module):
            quantizer, source = self._quantizer_of(node), node.args[0]
            if quantizer is None or not isinstance(source, Node):
                continue
            averages = is_average(self.module, source) or called(self.module, source) in POOLINGS
            quantizer.averages |= averages or is_interpolation(self.module, source)

    def _note_rounded_terms(self) -> None:
        """Inductor adds within a convolution, where torch.ao rounds first: with few levels that costs accuracy."""
        sums = {
            user
            for node in quantizer_nodes(self.module)
            if (quantizer := self._quantizer_of(node)) is not None and quantizer.bits < 7
            if isinstance(module_of(self.module, node.all_input_nodes[0]), nn.Conv2d)
            for user in node.users
            if user.target in SUMS
        }
        if sums:
            what = f"{len(sums)} sums have" if len(sums) > 1 else "1 sum has"
            self.notes.append(
                f"{what} a convolution's result rounded first, as torch.ao's kernels need it; those of backend "
                "'pt2e' don't, and with few bits that is more accurate"
            )

    def _weight_quantizer(self, node: Node) -> LearnedFakeQuantize | None:
        found: Any = getattr(module_of(self.module, node), "weight_fake_quant", None)
        if node.target in FUNCTIONS:  # its weight is computed
            weight = argument(node.args, node.kwargs, 1, "weight")
            found = self._quantizer_of(weight) if isinstance(weight, Node) else None
        return found if isinstance(found, LearnedFakeQuantize) and found.dtype == torch.qint8 else None

    def _refuse_nothing_quantized(self) -> None:
        found = [(str(node.target), module_of(self.module, node)) for node in quantizer_nodes(self.module)]
        if all(getattr(module, "is_dynamic", False) for _, module in found):
            refuse_dynamic((name, module) for name, module in found if module is not None)
        if not found:
            raise ModelError(
                "the prepared model quantizes nothing: its QConfigMapping matches none of its modules, or asks for "
                "types without kernels; prepare it with a QConfig for Conv2d and Linear, of quint8 activations and "
                "qint8 weights"
            )

    def _refuse_again(self) -> None:
        if self._calibrated:
            raise ModelError(
                "the prepared model has been calibrated before: its graph holds the limits of that calibration; "
                "prepare the float model again"
            )

    # -- phases ------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Switches observers and fake quantizers for the length of the ``with``."""
        observe = phase is Phase.OBSERVE
        if observe:
            self._refuse_again()
        quantize = phase in (Phase.TRAIN, Phase.EVALUATE) and self.trainable
        quantizers = [module for module in self.module.modules() if isinstance(module, FakeQuantizeBase)]
        observers = [module for module in self.module.modules() if isinstance(module, ObserverBase)]
        switches = switched(quantizers, observers, observe=observe, quantize=quantize)
        with module_modes(self.module, False), switches:
            yield  # BatchNorm is folded or frozen, dropout off

    def reference(self) -> FXPrepared:
        """A copy with the weights of now."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module)
        return twin

    @contextmanager
    def activations(self) -> Iterator[dict[str, Tensor]]:
        """The outputs of the activation quantizers, but for the one of the network's input."""
        names = [
            str(node.target)
            for node in quantizer_nodes(self.module)
            if not (isinstance(node.args[0], Node) and node.args[0].op == "placeholder")
        ]
        with capture_outputs({name: self.module.get_submodule(name) for name in names}) as seen:
            yield seen

    def set_ranges(self, how: str = "mse") -> None:
        """Turns what OBSERVE has seen into scales and zero points."""
        for quantizer in self._quantizers():
            if how == "mse":
                quantizer.search()
            else:
                quantizer.reset()

    def weights(self) -> Sequence[nn.Parameter]:
        """Weights and biases of the network that the user has not frozen."""
        steps = {id(step) for step in self.steps()}
        parameters = self.module.parameters()
        return [each for each in parameters if each.requires_grad and id(each) not in steps]

    def weight_units(self) -> Sequence[Tensor]:
        """The step of each weight's channel; a bias takes that of its weight times the root of the fan-in."""
        units: dict[int, Tensor] = {}
        for module in self.module.modules():
            quantizer = getattr(module, "weight_fake_quant", None)
            if not isinstance(quantizer, LearnedFakeQuantize):
                continue
            weight, bias = cast(nn.Parameter, module.weight), cast("nn.Parameter | None", module.bias)
            scale = quantizer.scale.detach()
            units[id(weight)] = quantizer.along(scale, weight.ndim)
            if bias is not None:
                units[id(bias)] = scale * weight[0].numel() ** 0.5
        # what is not quantized (an affine BatchNorm) moves by the rate times a hundredth of its size
        return [units.get(id(each), each.detach().abs().mean() / 100) for each in self.weights()]

    def steps(self) -> Sequence[nn.Parameter]:
        """Logarithms of the step sizes."""
        return [quantizer.log_scale for quantizer in self._quantizers()]

    def float_model(self) -> nn.Module:
        """The network before it was prepared."""
        self._refuse_again()
        model = float_copy(self._original)
        as_inference(model)
        return model

    # -- the way out -------------------------------------------------------------------------------

    def finish(self) -> None:
        """Makes the private copy ready for ``convert_fx``; its outputs stay what they were."""
        settle_weights(self.module, self.trainable)
        saturate_activations(self.module)
        clamp_computed_weights(self.module)
        average_channels_last(self.module)
        self.module.recompile()
        for module in self.module.modules():
            if isinstance(module, FakeQuantizeBase):
                module.disable_observer()
                module.enable_fake_quant()
        for parameter in self.steps():
            parameter.requires_grad_(False)

    def commit(self) -> None:
        """Writes the calibrated state into the user's model, in place."""
        self.finish()
        original, work = self._original, copy.deepcopy(self.module)
        take_over(original, work)
        original.meta[ATTRIBUTES] = work.meta[ATTRIBUTES]
        original.meta[CALIBRATED] = True

    def convert(self) -> nn.Module:
        """The integer network that ``convert_fx`` makes of the calibrated state."""
        self.finish()
        with using_engine(self.engine):
            converted = convert_fx(copy.deepcopy(self.module).cpu().eval())
        converted.meta[ENGINE] = self.engine
        return converted
