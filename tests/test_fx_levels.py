"""The FX backend: which levels weights and activations have, where they stand for bounds, and how ties are rounded."""

from __future__ import annotations

import copy
from typing import Any, cast

import models
import pytest
import torch
import torch.nn.functional as F
from fx_models import (
    EXAMPLE,
    Functional,
    Inverted,
    fake_and_converted,
    headed,
    levels_of_weights,
    users_mapping,
)
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.fake_quantize import FakeQuantize, default_per_channel_weight_fake_quant
from torch.ao.quantization.observer import (
    MinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    default_dynamic_quant_observer,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import adadfq_plugin
from adadfq_plugin.backends.fx import FXBackend, FXPrepared, qconfig_mapping, using_engine
from adadfq_plugin.backends.fx import prepared as prepared_module
from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.folding import fold_batch_norm
from adadfq_plugin.backends.fx.inference import as_inference
from adadfq_plugin.config import Scheme
from adadfq_plugin.contracts import Phase
from adadfq_plugin.ranges import levels_that_fit

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hidden_activations_have_two_to_the_bits_levels(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = models.prepared(bits)
    opened = FXBackend().open(prepared)
    models.observed(opened, models.images(64))
    opened.commit()
    converted = convert_fx(prepared.eval())
    seen: dict[str, int] = {}
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # the interpreter's progress bar starts a thread

    class Levels(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_quantized and n.target is torch.clamp:
                seen[n.name] = int(value.int_repr().max())
            return value

    Levels(converted).run(models.images(64) * 3)
    if bits == 8:
        assert not seen
    else:
        assert seen
        assert max(seen.values()) == 2**bits - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_observers_of_prepare_fx_keep_their_levels(bits: int) -> None:
    prepared = prepare_fx(models.trained(), users_mapping(bits, observers=True), EXAMPLE)
    opened = FXBackend().open(prepared)
    assert not opened.trainable
    batch = models.images(128)
    models.observed(opened, batch)
    opened.commit()
    network = convert_fx(prepared.eval())
    converted = network(batch)
    # the same observers as fake quantizers are the reference
    twin = prepare_qat_fx(models.trained().train(), users_mapping(bits), EXAMPLE)
    fold_batch_norm(twin)
    with torch.no_grad():
        twin.eval().apply(torch.ao.quantization.disable_fake_quant)(batch)
        reference = twin.apply(torch.ao.quantization.enable_fake_quant)(batch)
    exact = models.trained()(batch)
    assert (converted - exact).abs().mean() <= 1.1 * (reference - exact).abs().mean()
    narrow = bits == 8 and any("7-bit weights" in note for note in opened.notes)
    assert levels_of_weights(network) == {(-64, 63) if narrow else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)}


def observing_mapping(weights: str) -> QConfigMapping:
    """A user's own observers, with weights that are observed or fake-quantized."""
    observed: Any = users_mapping(8, observers=True).global_qconfig
    chosen: Any = users_mapping(8, observers=weights == "observer").global_qconfig
    return QConfigMapping().set_global(QConfig(observed.activation, chosen.weight))


@pytest.mark.parametrize("weights", ["observer", "fake quantizer"])
@pytest.mark.parametrize("engine", ["x86", "fbgemm", "onednn"])
def test_without_vnni_observed_weights_are_narrowed(
    engine: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of single layers and of those that torch.ao has fused with their activation."""
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"no {engine} in this build of torch")
    monkeypatch.setattr(prepared_module, "has_vnni", lambda: False)
    with using_engine(engine):
        opened = FXBackend().open(prepare_fx(models.trained(), observing_mapping(weights), EXAMPLE))
        batch = models.images(128)
        models.observed(opened, batch)
        converted = opened.convert()
        with torch.no_grad():
            exact = models.trained()(batch)
            assert (converted(batch) - exact).abs().mean() <= 0.02 * exact.std()
    assert [note for note in opened.notes if note.startswith("4 layers have 7-bit weights")]
    assert levels_of_weights(converted) == {(-64, 63)}


def test_activations_take_few_levels() -> None:
    opened, batch = FXBackend().open(models.prepared(3)), models.images(8)
    models.observed(opened, batch)
    with torch.no_grad(), opened.phase(Phase.TRAIN), opened.activations() as of_q:
        opened.module(batch)
    assert max(each.unique().numel() for each in of_q.values() if each.ndim == 4) <= 8


def test_global_averages_have_levels_of_their_own() -> None:
    opened = FXBackend().open(models.prepared(4))
    models.observed(opened, models.images(64))
    calls: dict[Any, Any] = {node.target: node for node in opened.module.graph.nodes}
    (behind,) = calls["linear"].all_input_nodes
    assert calls["pool"] in behind.args[0].all_input_nodes  # nothing is rounded between the two
    before, after = (opened.module.get_submodule(each.target) for each in (calls["pool"].args[0], behind))
    assert isinstance(before, LearnedFakeQuantize)
    assert isinstance(after, LearnedFakeQuantize)
    assert before.quant_max == after.quant_max == 15
    assert bool(after.scale < 0.8 * before.scale)


def test_boundary_takes_eight_bits() -> None:
    opened = FXBackend().open(models.prepared(4))
    levels = [
        module.quant_max for module in opened.module.modules() if isinstance(module, LearnedFakeQuantize)
    ]
    assert levels.count(255) == 2  # input and logits
    assert levels.count(15) > 2
    assert opened.lowest_bits == 4


def weight_levels(bits: int) -> tuple[set[int], list[str]]:
    opened = FXBackend().open(models.prepared(bits))
    quantizers = [m for m in opened.module.modules() if isinstance(m, LearnedFakeQuantize)]
    return {m.quant_min for m in quantizers if m.per_channel}, opened.notes


@pytest.mark.parametrize("bits", [4, 8])
def test_a_convolution_rounded_before_its_sum_is_told_at_few_bits(bits: int) -> None:
    told = [
        note for note in weight_levels(bits)[1] if note.startswith("1 sum has a convolution's result rounded")
    ]
    assert len(told) == (bits < 8)


@pytest.mark.parametrize("engine", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_without_vnni_weights_are_narrowed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_module, "has_vnni", lambda: False)
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"no {engine} in this build of torch")
    with using_engine(engine):
        levels, notes = weight_levels(8)
        assert not any("7-bit" in note for note in weight_levels(4)[1])  # four-bit weights can't overflow
    if engine == "qnnpack":
        assert (levels, notes) == ({-128}, [])
    else:
        assert levels == {-64}
        assert "4 layers have 7-bit weights" in notes[0]


def test_what_was_calibrated_with_vnni_keeps_its_levels_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranges were set for them."""
    prepared, batch = models.prepared(8), models.images(64)
    monkeypatch.setattr(prepared_module, "has_vnni", lambda: True)
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    opened.commit()
    monkeypatch.setattr(prepared_module, "has_vnni", lambda: False)
    again = FXBackend().open(prepared)
    assert {each.quant_min for each in again.module.modules() if getattr(each, "per_channel", False)} == {
        -128
    }
    with torch.no_grad(), opened.phase(Phase.EVALUATE), again.phase(Phase.EVALUATE):
        assert torch.equal(again.module(batch), opened.module(batch))


@pytest.mark.parametrize(
    "observer", [NoopObserver.with_args(dtype=torch.quint8), default_dynamic_quant_observer]
)
def test_observers_without_levels_overflow_nothing(observer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the head alone; the convolutions have levels."""
    monkeypatch.setattr(prepared_module, "has_vnni", lambda: False)
    mapping = users_mapping(8, observers=True)
    mapping.set_object_type(
        nn.Linear, QConfig(observer, PerChannelMinMaxObserver.with_args(dtype=torch.qint8))
    )
    with using_engine("x86"):
        opened = FXBackend().open(prepare_fx(models.trained(), mapping, EXAMPLE))
    assert any(note.startswith("3 layers have 7-bit weights") for note in opened.notes)


@pytest.mark.parametrize("activation", [3, 15, 63, 127, 255])
def test_levels_that_fit_never_overflow_and_are_the_widest(activation: int) -> None:
    low, high = levels_that_fit(-(2**15), 2**15 - 1, activation)
    assert (low, high) == (-high - 1, -low - 1)
    assert 2 * activation * -low <= 32767 < 2 * activation * (-low + 1)
    assert levels_that_fit(low, high, activation) == (low, high)
    assert levels_that_fit(-4, 3, activation) == (-4, 3)


@pytest.mark.parametrize(
    ("activation", "top"),
    [(nn.ReLU6(), 6.0), (nn.Hardtanh(0.0, 3.0), 3.0)],
    ids=["relu6", "hardtanh"],
)
def test_bounded_activations_take_all_levels(activation: nn.Module, top: float) -> None:
    torch.manual_seed(0)
    model = Inverted(activation)
    model.expand.weight.data *= 40
    x = torch.randn(8, 3, 8, 8)
    prepared = prepare_qat_fx(model.train(), qconfig_mapping(Scheme()), (x,))
    opened = FXPrepared(prepared)
    assert not [node for node in opened.module.graph.nodes if node.target == "activation"]
    (quantizer,) = [each for each in opened.module.modules() if getattr(each, "limits", None) is not None]
    assert isinstance(quantizer, LearnedFakeQuantize)
    with torch.no_grad(), opened.phase(Phase.OBSERVE):
        torch.testing.assert_close(opened.module(x), model.eval()(x))  # the bounds hold without rounding too
    opened.set_ranges("mse")
    low, high = quantizer.bounds()
    assert low == 0
    assert 0.9 * top < high <= 1.001 * top
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake = opened.module(x)
    converted = opened.convert()(x)
    assert (fake - converted).abs().mean() <= 0.01 * fake.std()
    assert (model(x) - converted).abs().mean() <= 0.05 * fake.std()


def test_a_clamp_stays_where_its_input_is_used_elsewhere() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    model = Inverted(nn.ReLU6(), shared=True)
    prepared = prepare_qat_fx(model.train(), qconfig_mapping(Scheme()), (x,))
    opened = FXPrepared(prepared)
    assert [node for node in opened.module.graph.nodes if node.target == "activation"]
    assert not [each for each in opened.module.modules() if getattr(each, "limits", None) is not None]


class _Cut(nn.Module):
    """A convolution whose outputs are used as they are and, beside, within bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return cast(Tensor, self.linear((torch.clamp(x, -0.5, 0.5) + x).mean((2, 3))))


def test_few_levels_are_kept_beside_a_clamp_of_the_networks_own() -> None:
    """A convolution saturates at the last level also where the network clamps, and once only when finished again."""
    torch.manual_seed(0)
    calm, wild = models.images(64), 4 * models.images(64)
    prepared = models.prepared(4, _Cut())
    opened = FXBackend().open(prepared)
    models.observed(opened, calm)
    opened.commit()
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake = opened.module(wild)
    converted = convert_fx(copy.deepcopy(prepared).eval())
    assert (converted(wild) - fake).abs().mean() <= 0.02 * fake.std()
    clamps = [node.target for node in prepared.graph.nodes].count(torch.clamp)
    FXPrepared(prepared).commit()
    assert [node.target for node in prepared.graph.nodes].count(torch.clamp) == clamps


class Pooled(nn.Module):
    """Averages over quantized tensors that are not channels last: the images, and what a permutation leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.pool = nn.Conv2d(3, 8, 3), nn.Conv2d(8, models.CLASSES, 3), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(nn.functional.avg_pool2d(x, 2)).permute(0, 1, 3, 2)
        return cast(Tensor, self.head(self.pool(x)).flatten(1))


def test_averages_round_ties_alike_in_every_layout() -> None:
    """Integer poolings round ``average + zero point`` to even, but for channels last, where it is the average."""
    prepared = models.prepared(8, Pooled())
    opened, batch = FXBackend().open(prepared), models.images(32)
    models.observed(opened, batch)
    for module in opened.module.modules():
        if isinstance(module, LearnedFakeQuantize) and not module.per_channel:
            module.zero_point.bitwise_or_(1)
    with torch.no_grad():
        with opened.phase(Phase.EVALUATE):
            fake = opened.module(batch)
        converted = opened.convert()(batch)
        assert (fake - converted).abs().mean() <= 0.002 * fake.std()
        opened.commit()
        assert torch.equal(prepared.eval()(batch), fake)
        assert torch.equal(convert_fx(prepared)(batch), converted)


def test_averages_of_tensors_without_such_layouts_convert() -> None:
    """A pooling takes the tokens' three dimensions for channels, height and width."""
    model = nn.Sequential(
        nn.Conv2d(3, models.CLASSES, 3), nn.Flatten(2), nn.AdaptiveAvgPool2d((None, 1)), nn.Flatten()
    )
    fake, converted = fake_and_converted(model)
    assert (fake - converted).abs().mean() <= 0.05 * fake.std()


class Joins(nn.Module):
    """A tensor that two concatenations join, in the first of them with one of 20 times its range.

    Args:
        both: what becomes of the tensor in both of them.
        large: what becomes of the other one.
    """

    def __init__(self, both: Any, large: Any) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 8, 3) for _ in range(3))
        self.both, self.large, self.head = both, large, nn.Linear(16, models.CLASSES)
        with torch.no_grad():
            self.two.weight *= 20

    def forward(self, x: Tensor) -> Tensor:
        both, large = self.both(self.one(x)), self.large(self.two(x))
        first, second = torch.cat([both, large], 1), torch.cat([self.three(x), both], 1)
        return cast(Tensor, self.head((first * second).mean((2, 3))))


def same(x: Tensor) -> Tensor:
    return x


def turned(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 2)


def pooled(x: Tensor) -> Tensor:
    return nn.functional.max_pool2d(x, 3, 1, 1)


def averaged(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 3, 1, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("both", "large"),
    [(same, same), (turned, turned), (same, pooled), (averaged, same), (same, nn.functional.relu6)],
)
def test_concatenations_join_equal_levels(both: Any, large: Any, seed: int) -> None:
    """torch.ao gives each tensor the quantizer of the last one's first, and forgets what else had shared it."""
    torch.manual_seed(seed)
    prepared, batch = models.prepared(8, Joins(both, large)), models.images(64)
    settings = {"samples": 32, "batch_size": 16, "steps": 8}
    facts: Any = {"input_size": models.SIZE, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    adadfq_plugin.calibrate(prepared, method="noise", settings=settings, **facts)
    with torch.no_grad():
        fake = prepared.eval()(batch)
        converted = convert_fx(copy.deepcopy(prepared))
        assert (converted(batch) - fake).abs().mean() <= 0.02 * fake.std()
    assert [len(levels) for levels in models.joined(converted, batch)] == [1, 1]


def viewed_gate(x: Tensor) -> Tensor:
    return turned(x.sigmoid())


@pytest.mark.parametrize(
    ("both", "large", "in_float"),
    [
        (torch.sigmoid, same, 2),
        (viewed_gate, same, 2),
        (same, torch.tanh, 1),
        (torch.sigmoid, viewed_gate, 1),
    ],
)
def test_nothing_takes_the_range_of_a_gate_it_is_joined_with(both: Any, large: Any, in_float: int) -> None:
    torch.manual_seed(0)
    model, batch = Joins(both, large).eval(), models.images(64)
    opened = FXBackend().open(FXBackend().prepare(model, models.SIZE, Scheme()))
    models.observed(opened, batch)
    with torch.no_grad():
        exact, converted = model(batch), opened.convert()(batch)
    assert (converted - exact).abs().mean() <= 0.1 * exact.std()
    told = " ".join(opened.notes)
    assert ("2 torch.cat" in told) == (in_float == 2)
    assert "joins a sigmoid or the like with other tensors" in told


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_that_a_concatenation_changes_are_few(bits: int) -> None:
    """Narrow levels saturate in front of the concatenation and behind it; a ReLU6 there is left to its quantizer."""
    prepared, batch = models.prepared(bits, Joins(turned, nn.functional.relu6)), models.images(64)
    opened = FXBackend().open(prepared)
    assert [each.limits for each in opened._quantizers() if each.limits is not None] == [(0, 6)]
    models.observed(opened, batch)
    with torch.no_grad():
        with opened.phase(Phase.EVALUATE):
            fake = opened.module(batch)
        opened.commit()
        assert torch.equal(prepared.eval()(batch), fake)
        converted = convert_fx(copy.deepcopy(prepared))
        assert (converted(batch) - fake).abs().mean() <= 0.05 * fake.std()
    again = FXBackend().open(prepared)
    assert len(again.module.graph.nodes) <= len(prepared.graph.nodes)  # nothing is put there twice
    assert [len(levels) for levels in models.joined(converted, batch)] == [1, 1]


@pytest.mark.parametrize("qat", [True, False])
def test_observed_concatenations_convert(qat: bool) -> None:
    """Also with the user's own observers, which see what they have rounded once more."""
    model, batch = Joins(same, turned).eval(), models.images(64)
    prepare = prepare_qat_fx if qat else prepare_fx
    prepared = prepare(model.train(qat), users_mapping(8, observers=not qat), EXAMPLE)
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    converted = opened.convert()
    with torch.no_grad():
        expected = model.eval()(batch)
        assert (converted(batch) - expected).abs().mean() <= 0.2 * expected.std()
    assert [len(levels) for levels in models.joined(converted, batch)] == [1, 1]


def test_a_clamp_stays_in_front_of_levels_below_it() -> None:
    """Of a symmetric quantizer half of the levels lie below what a ReLU6 lets through."""
    activation = FakeQuantize.with_args(
        observer=MinMaxObserver,
        quant_min=0,
        quant_max=255,
        dtype=torch.quint8,
        qscheme=torch.per_tensor_symmetric,
    )
    mapping = QConfigMapping().set_global(QConfig(activation, default_per_channel_weight_fake_quant))
    model, batch = headed(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3)), models.images(32)
    opened = FXBackend().open(prepare_qat_fx(copy.deepcopy(model).train(), mapping, EXAMPLE))
    models.observed(opened, batch, "minmax")
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        seen: list[Tensor] = []
        (second,) = (each for name, each in opened.module.named_modules() if name == "2")
        with_hook = second.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        opened.module(batch)
        with_hook.remove()
    assert seen[0].min() >= 0


def test_observers_of_our_mapping_keep_the_boundary_levels() -> None:
    opened = FXBackend().open(
        prepare_fx(models.trained(), qconfig_mapping(Scheme(activation_bits=4)), EXAMPLE)
    )
    levels = [each.quant_max for each in opened._quantizers() if not each.per_channel]
    assert (levels[0], levels[-1], max(levels[1:-1])) == (255, 255, 15)


def test_a_mean_that_keeps_its_batch_statistics_is_left_alone() -> None:
    class Batch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            normed: Tensor = F.batch_norm(x, None, None, training=True)
            return normed

    traced = torch.fx.symbolic_trace(Batch())
    as_inference(traced)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(traced(x), Batch()(x))


@pytest.mark.parametrize("bounds", [(0.5, 3.0), (-3.0, -0.5)])
def test_bounds_that_no_levels_keep_stay_in_the_graph(bounds: tuple[float, float]) -> None:
    """Levels include zero, whatever the range."""
    torch.manual_seed(0)
    model, x = Inverted(nn.Hardtanh(*bounds)), torch.randn(8, 3, 8, 8)
    opened = FXPrepared(prepare_qat_fx(model.train(), qconfig_mapping(Scheme()), (x,)))
    models.observed(opened, x)
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake, exact = opened.module(x), model.eval()(x)
    assert (fake - exact).abs().mean() <= 0.05 * exact.std()
    assert (opened.convert()(x) - fake).abs().mean() <= 0.02 * fake.std()


class Gated(nn.Module):
    """Averages that a layer reads directly."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.gate, self.linear = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.Linear(8, 5)
        self.pool, self.window, self.how = nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(14), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        if self.how == "method":
            return cast(Tensor, self.linear(x.mean((2, 3))))
        if self.how == "function":
            return cast(Tensor, self.linear(torch.mean(x, (2, 3))))
        pooled = self.window(x) if self.how == "window" else self.pool(x)
        return cast(Tensor, self.gate(pooled).flatten(1))


@pytest.mark.parametrize(
    ("how", "own"),
    [
        *((how, False) for how in ("method", "function", "gate", "window")),
        *(
            (how, True) for how in ("method", "function", "gate")
        ),  # nobody tells that a window is all of the image
    ],
)
def test_an_average_is_not_rounded_to_the_levels_of_what_it_takes(how: str, own: bool) -> None:
    """torch.ao lowers what stands between two quantizers, whatever its qconfig."""
    scheme, batch = Scheme(weight_bits=8, activation_bits=3), models.images(64)
    model = Gated(how).eval()
    if own:
        prepared: Any = prepare_qat_fx(copy.deepcopy(model).train(), qconfig_mapping(scheme), EXAMPLE)
    else:
        prepared = FXBackend().prepare(model, models.SIZE, scheme)
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    (name,) = [name for name, each in opened.module.named_modules() if getattr(each, "averages", False)]
    with opened.phase(Phase.EVALUATE), opened.activations() as seen, torch.no_grad():
        expected, converted = opened.module(batch), opened.convert()
        assert (converted(batch) - expected).abs().max() <= 1e-4 * expected.std()
    assert len(seen[name].unique()) > 6  # of 8


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_computed_weights_keep_their_levels(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``convert_fx`` gives them all levels of the integer type."""
    monkeypatch.setattr(prepared_module, "has_vnni", lambda: False)
    opened = FXBackend().open(prepare_qat_fx(Functional().train(), users_mapping(bits), EXAMPLE))
    models.observed(opened, batch := models.images(64))
    with opened.phase(Phase.EVALUATE), torch.no_grad():
        expected = opened.module(batch)
        converted = opened.convert()
        assert (converted(batch) - expected).abs().mean() <= 0.005 * expected.std()
    (packed,) = [each for name, each in vars(converted).items() if name.startswith("_packed_weight")]
    levels = packed.unpack()[0].int_repr()
    limit = 64 if bits == 8 else 2 ** (bits - 1)
    assert -limit <= levels.min()
    assert levels.max() == limit - 1
    opened.finish()
    nodes = len(opened.module.graph.nodes)
    opened.finish()
    assert len(opened.module.graph.nodes) == nodes  # nothing is put there twice


@pytest.mark.parametrize("bits", [4, 8])
def test_bounds_between_calls_in_float_stay_in_the_graph(bits: int) -> None:
    """torch.ao converts no quantizer there, and the ReLU6 would be gone."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.linear = nn.Linear(8, models.CLASSES)
            with torch.no_grad():
                self.two.weight *= 20

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.linear(F.relu6(self.two(self.one(x).relu())).mean((2, 3))))

    model, batch = Kept(), models.images(32)
    mapping = qconfig_mapping(Scheme(weight_bits=bits, activation_bits=bits), float_modules=["two"])
    opened = FXBackend().open(prepare_qat_fx(model.train(), mapping, EXAMPLE))
    models.observed(opened, batch)
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake = opened.module(batch)
    assert (opened.convert()(batch) - fake).abs().mean() <= 0.01 * fake.std()


@pytest.mark.parametrize("module", [True, False])
def test_interpolations_round_ties_as_their_kernel_does(module: bool) -> None:
    """Weighed in sixteenths, every eighth value lies midway between two levels."""

    class Enlarged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
            self.linear = nn.Linear(8, models.CLASSES)
            self.up = nn.Upsample(scale_factor=2, mode="bilinear")

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            x = self.up(x) if module else F.interpolate(x, (32, 32), None, "bilinear", False)
            return cast(Tensor, self.linear(self.conv(x).relu().mean((2, 3))))

    for seed in range(3):
        torch.manual_seed(seed)
        prepared = FXBackend().prepare(Enlarged().eval(), models.SIZE, Scheme(activation_bits=4))
        opened = FXBackend().open(prepared)
        models.observed(opened, batch := models.images(32))
        with torch.no_grad(), opened.phase(Phase.EVALUATE):
            fake = opened.module(batch)
            assert (opened.convert()(batch) - fake).abs().max() <= 0.01 * fake.std()
