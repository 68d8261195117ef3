"""The FX backend: what is calibrated is what torch.ao's own convert gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast
from zipfile import ZIP_DEFLATED, ZipFile

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import (
    QConfig,
    QConfigMapping,
    default_dynamic_qat_qconfig,
    default_dynamic_qconfig,
    default_embedding_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.fake_quantize import FakeQuantize, default_per_channel_weight_fake_quant
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.observer import (
    MinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    default_dynamic_quant_observer,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import adadfq_plugin
from adadfq_plugin.backends.fx import (
    FXBackend,
    FXPrepared,
    _engine_of,
    best_engine,
    qconfig_mapping,
    traceable,
    using_engine,
)
from adadfq_plugin.backends.fx import kernels as kernels_module
from adadfq_plugin.backends.fx import prepared as prepared_module
from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.folding import float_copy, fold_batch_norm
from adadfq_plugin.backends.fx.inference import as_inference
from adadfq_plugin.config import Scheme
from adadfq_plugin.contracts import Backend, Phase, Prepared
from adadfq_plugin.errors import DataError, ModelError, SettingsError
from adadfq_plugin.game.rounding import round_weights
from adadfq_plugin.ranges import levels_that_fit
from adadfq_plugin.streams import readers

pytestmark = pytest.mark.usefixtures("seeded")
EXAMPLE = (torch.zeros(2, *models.SIZE),)


def users_mapping(bits: int, observers: bool = False) -> QConfigMapping:
    """A user's own QConfig with torch.ao's classes."""
    act = {
        "quant_min": 0,
        "quant_max": 2**bits - 1,
        "dtype": torch.quint8,
        "qscheme": torch.per_tensor_affine,
    }
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = {
        "quant_min": low, "quant_max": high, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric
    }  # fmt: skip
    if observers:
        pair = MinMaxObserver.with_args(**act), PerChannelMinMaxObserver.with_args(**weight)
    else:
        pair = (
            FakeQuantize.with_args(observer=MinMaxObserver, **act),
            FakeQuantize.with_args(observer=PerChannelMinMaxObserver, **weight),
        )
    return QConfigMapping().set_global(QConfig(*pair))


def test_it_is_a_backend() -> None:
    assert isinstance(FXBackend(), Backend)
    assert isinstance(FXBackend().open(models.prepared()), Prepared)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mapping", ["ours", "users", "default"])
def test_convert_gives_what_was_calibrated(bits: int, mapping: str) -> None:
    if mapping == "default" and bits != 8:
        pytest.skip("torch.ao's default mapping has 8 bits")
    if mapping == "ours":
        prepared = models.prepared(bits)
    else:
        chosen = users_mapping(bits) if mapping == "users" else get_default_qat_qconfig_mapping("x86")
        prepared = prepare_qat_fx(models.trained().train(), chosen, EXAMPLE)
    batch = models.images(128)
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        calibrated = opened.module(batch)
    opened.commit()
    with torch.no_grad():
        fake = prepared.eval()(batch)
        converted = convert_fx(copy.deepcopy(prepared))(batch)
    assert torch.equal(calibrated, fake)
    assert (fake - converted).abs().mean() <= 0.05 * fake.std()
    assert (fake.argmax(1) == converted.argmax(1)).float().mean() >= 0.98
    assert fake.std() > 0


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


def levels_of_weights(converted: nn.Module) -> set[tuple[int, int]]:
    """The least and the largest level of each integer layer's weight."""
    layers: list[Any] = [each for each in converted.modules() if callable(getattr(each, "weight", None))]
    levels: list[Tensor] = [layer.weight().int_repr() for layer in layers]
    return {(int(each.min()), int(each.max())) for each in levels}


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


class Functional(nn.Module):
    """Layers without modules: one weight read twice, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8, 3, 3) / 8), nn.Parameter(torch.randn(8) / 8)
        self.computed, self.head = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.randn(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        x = F.conv2d(x, self.weight, bias=self.bias, padding="same")
        x = F.conv2d(x, self.computed - self.computed.mean(), None, (1, 1), (0, 0), (1, 1), 1)
        return F.linear(x.mean((2, 3)), self.head)


@pytest.mark.parametrize("trained", [True, False])
def test_functional_layers_are_layers(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.ao has the quantizers of their weights among those of the activations."""
    monkeypatch.setattr(prepared_module, "has_vnni", lambda: False)
    model, batch = Functional().eval(), models.images(128)
    mapping = users_mapping(8, observers=not trained)
    prepared = (
        prepare_qat_fx(copy.deepcopy(model).train(), mapping, EXAMPLE)
        if trained
        else prepare_fx(copy.deepcopy(model), mapping, EXAMPLE)
    )
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    with torch.no_grad():
        exact, converted = model(batch), opened.convert()
        assert (converted(batch) - exact).abs().mean() <= 0.06 * exact.std()
        if trained:
            with opened.phase(Phase.EVALUATE):
                assert (converted(batch) - opened.module(batch)).abs().mean() <= 0.005 * exact.std()
    names = {type(each).__name__ for each in converted.modules()}
    assert {"ConvReLU2d", "Conv2d", "Linear"} <= names
    assert levels_of_weights(converted) == {(-64, 63)}
    if trained:
        assert [note for note in opened.notes if note.startswith("4 layers have 7-bit weights")]
        with opened.phase(Phase.EVALUATE), opened.activations() as seen, torch.no_grad():
            opened.module(batch)
        assert not any(
            each.shape == weight.shape for each in seen.values() for weight in opened.weights()[3:]
        )


@pytest.mark.parametrize("computed", [False, True])
def test_weights_given_by_keyword(computed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_module, "has_vnni", lambda: False)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(10, 8))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.head.abs() if computed else self.head
            return F.linear(self.conv(x).mean((2, 3)), bias=None, weight=weight)

    opened = FXBackend().open(prepare_qat_fx(Named().train(), users_mapping(8), EXAMPLE))
    functions = [node.target for node in opened.module.graph.nodes if node.op == "call_function"]
    assert (F.linear in functions) == computed
    assert [note.partition(":")[0] for note in opened.notes] == ["2 layers have 7-bit weights"]
    models.observed(opened, models.images(8))


def test_channels_with_gamma_zero_convert() -> None:
    model = models.trained()
    with torch.no_grad():
        model.bn2.weight[:3] = 0
        model.bn3.weight.zero_()
    expected = model(batch := models.images(32))
    prepared = models.prepared(8, model)
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    opened.commit()
    converted = convert_fx(prepared.eval())(batch)
    assert torch.isfinite(converted).all()
    assert (converted - expected).abs().mean() < 0.1 * expected.std() + 0.02


def test_folding_and_the_way_back_are_exact() -> None:
    model = models.trained()
    batch = models.images(8)
    expected = model(batch)
    prepared = models.prepared(8, model)
    before = models.state(prepared)
    with torch.no_grad():
        assert torch.allclose(float_copy(prepared).eval()(batch), expected, atol=1e-5)
        folded = copy.deepcopy(prepared)
        fold_batch_norm(folded)
        folded.apply(torch.ao.quantization.disable_fake_quant).apply(torch.ao.quantization.disable_observer)
        assert torch.allclose(folded.eval()(batch), expected, atol=1e-4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in float_copy(prepared).modules())
    assert models.same(before, models.state(prepared))


def test_the_original_is_touched_by_commit_alone() -> None:
    prepared = models.prepared(4)
    before = models.state(prepared)
    opened = FXBackend().open(prepared)
    models.observed(opened, models.images(16))
    opened.convert()
    assert models.same(before, models.state(prepared))
    opened.commit()
    assert not models.same(before, models.state(prepared))


def test_phases_restore_switches_also_after_an_exception() -> None:
    opened = FXBackend().open(models.prepared(4))
    before = models.state(opened.module)
    outer, inner = opened.phase(Phase.EVALUATE), opened.phase(Phase.FLOAT)
    with pytest.raises(KeyError), outer, inner:
        raise KeyError
    assert models.same(before, models.state(opened.module))


def test_phases_do_what_they_say() -> None:
    opened = FXBackend().open(models.prepared(3))
    batch = models.images(8)
    with torch.no_grad():
        with opened.phase(Phase.FLOAT):
            exact = opened.module(batch)
        with opened.phase(Phase.OBSERVE):
            assert torch.equal(opened.module(batch), exact)
        opened.set_ranges()
        with opened.phase(Phase.EVALUATE):
            assert not torch.allclose(opened.module(batch), exact, atol=1e-3)
    for step in opened.steps():
        step.requires_grad_(True)
    with opened.phase(Phase.TRAIN):
        opened.module(batch).square().mean().backward()
    assert all(step.grad is not None for step in opened.steps()[:3])
    assert all(weight.grad is not None for weight in opened.weights())


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("there", [False, True])
def test_observed_models_are_calibrated_on_a_gpu(there: bool) -> None:
    prepared = prepare_fx(models.trained(), get_default_qconfig_mapping("x86"), EXAMPLE)
    told: dict[str, Any] = {"input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "method": "noise"}
    settings = {"samples": 16, "batch_size": 8, "range_samples": 16}
    if there:
        adadfq_plugin.calibrate(prepared.cuda(), settings=settings, **told)
    else:
        adadfq_plugin.calibrate(prepared, settings=settings, device="cuda", **told)
    batch = models.images(64)
    with torch.no_grad():
        exact = models.trained()(batch)
        assert (convert_fx(prepared.cpu())(batch) - exact).abs().mean() <= 0.1 * exact.std()


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


def fake_and_converted(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits at W8A8 of the calibrated model and of what the user's own convert makes of it."""
    prepared = models.prepared(8, model)
    opened = FXBackend().open(prepared)
    batch = models.images(64)
    models.observed(opened, batch)
    opened.commit()
    with torch.no_grad():
        fake, converted = prepared.eval()(batch), convert_fx(copy.deepcopy(prepared))(batch)
    return fake, converted


def test_wide_depthwise_convolutions_convert() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 144, 1), nn.BatchNorm2d(144), nn.ReLU(), nn.Conv2d(144, 144, 3, padding=1, groups=144),
        nn.BatchNorm2d(144), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(144, 5),
    )  # fmt: skip
    with torch.no_grad():
        nn.init.uniform_(
            cast(nn.Conv2d, model[3]).weight, 0, 0.5
        )  # one sign: the worst case for sums of two products
        model(models.images(64))
    fake, converted = fake_and_converted(model)
    assert (fake - converted).abs().mean() <= 0.05 * fake.std()


def test_transposed_convolutions_convert() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    with torch.no_grad():
        model(models.images(64))
    fake, converted = fake_and_converted(model)
    assert (fake - converted).abs().mean() <= 0.5 * fake.std()  # torch.ao fake-quantizes no weights of these


@pytest.mark.parametrize("channels", [8, 16])
def test_transposed_convolutions_without_a_right_kernel_stay_in_float(channels: int) -> None:
    """oneDNN's, the one of x86, is wrong where the numbers of channels in and out differ (torch 2.14)."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, channels, 2), nn.Flatten(2))
    prepared = FXBackend().prepare(model, models.SIZE, Scheme(engine="x86"))
    opened, batch = FXBackend().open(prepared), models.images(16)
    models.observed(opened, batch)
    with torch.no_grad(), using_engine("x86"):
        with opened.phase(Phase.EVALUATE):
            fake = opened.module(batch)
        converted = opened.convert()(batch)
    assert (fake - converted).abs().mean() <= 0.05 * fake.std()  # the weights alone are rounded


def test_a_saved_model_is_read_for_its_own_engine(tmp_path: Path) -> None:
    engine = next(
        each for each in ("qnnpack", "fbgemm") if each in torch.backends.quantized.supported_engines
    )
    opened = FXBackend().open(FXBackend().prepare(models.trained(), models.SIZE, Scheme(engine=engine)))
    models.observed(opened, batch := models.images(8))
    converted = opened.convert()
    FXBackend().save(converted, batch[:1], tmp_path / "net.pt")
    with torch.no_grad():
        assert torch.equal(FXBackend().load(tmp_path / "net.pt")(batch), converted(batch))
    assert _engine_of(tmp_path / "net.pt") == engine
    with ZipFile(tmp_path / "bare.pt", "w") as archive:
        archive.writestr("net/code", "")
    assert _engine_of(tmp_path / "bare.pt") == best_engine()
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.pt is no converted model"):
        FXBackend().load(tmp_path / "text.pt")


def test_engine_is_restored_and_named_when_missing() -> None:
    before = torch.backends.quantized.engine
    with pytest.raises(ZeroDivisionError), using_engine(best_engine()):
        raise ZeroDivisionError
    assert torch.backends.quantized.engine == before
    with pytest.raises(SettingsError, match="'tpu'"), using_engine("tpu"):
        pass
    with pytest.raises(SettingsError, match="no quantized engine"):
        kernels_module.best_engine([], "x86_64")


def test_refusals_name_the_culprit() -> None:
    backend = FXBackend()
    with pytest.raises(ModelError, match="Residual is not prepared"):
        backend.open(models.trained())
    prepared = models.prepared()
    opened = backend.open(prepared)
    models.observed(opened, models.images(8))
    with pytest.raises(ModelError, match="already converted"):
        backend.open(opened.convert())
    nothing = prepare_qat_fx(models.trained().train(), QConfigMapping(), EXAMPLE)
    with pytest.raises(ModelError, match="quantizes nothing"):
        backend.open(nothing)


def test_prepare_fx_default_mapping_converts() -> None:
    prepared = prepare_fx(models.trained(), get_default_qconfig_mapping("x86"), EXAMPLE)
    opened = FXBackend().open(prepared)
    batch = models.images(64)
    models.observed(opened, batch)
    opened.commit()
    expected = models.trained()(batch)
    assert (convert_fx(prepared)(batch) - expected).abs().mean() < 0.2 * expected.std()


def test_saved_model_reloads(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "model.pt"
    opened = FXBackend().open(models.prepared())
    models.observed(opened, models.images(32))
    converted = opened.convert()
    FXBackend().save(converted, torch.zeros(1, *models.SIZE), path)
    batch = models.images(7)
    assert torch.equal(FXBackend().load(path)(batch), converted(batch))
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"model\.pt"):
        FXBackend().load(path)


class _Inverted(nn.Module):
    """Convolutions with activations of their own bounds behind them."""

    def __init__(self, activation: nn.Module, shared: bool = False) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.activation, self.shared, self.fc = activation, shared, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x)
        y = self.project(self.activation(inner))
        return cast(Tensor, self.fc((y + inner if self.shared else y).mean((2, 3))))


@pytest.mark.parametrize(
    ("activation", "top"),
    [(nn.ReLU6(), 6.0), (nn.Hardtanh(0.0, 3.0), 3.0)],
    ids=["relu6", "hardtanh"],
)
def test_bounded_activations_take_all_levels(activation: nn.Module, top: float) -> None:
    torch.manual_seed(0)
    model = _Inverted(activation)
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
    model = _Inverted(nn.ReLU6(), shared=True)
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


def test_saved_archive_is_compressed_and_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    opened = FXPrepared(prepare_qat_fx(_Inverted(nn.ReLU6()).train(), qconfig_mapping(Scheme()), (x,)))
    with torch.no_grad(), opened.phase(Phase.OBSERVE):
        opened.module(x)
    opened.set_ranges("mse")
    converted, backend, path = opened.convert(), FXBackend(), tmp_path / "quantized.pt"
    backend.save(converted, x, path)
    assert [each.name for each in tmp_path.iterdir()] == ["quantized.pt"]
    with ZipFile(path) as archive:
        assert all(item.compress_type == ZIP_DEFLATED for item in archive.infolist() if item.file_size > 64)
    with torch.no_grad():
        torch.testing.assert_close(backend.load(path)(x), converted(x), rtol=0, atol=0)


def test_layers_that_are_quantization_aware_by_hand_keep_their_batch_norm() -> None:
    """Asymmetric weights, and BatchNorm in float between them: the quantization that papers report."""
    learned: Any = LearnedFakeQuantize.with_args
    channels = {"dtype": torch.qint8, "qscheme": torch.per_channel_affine, "ch_axis": 0}
    weight = learned(quant_min=-8, quant_max=7, **channels)
    model = models.trained()
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Conv2d):
            child.qconfig = QConfig(activation=NoopObserver, weight=weight)  # type: ignore[assignment]
            setattr(model, name, torch.ao.nn.qat.Conv2d.from_float(child))
        elif isinstance(child, nn.ReLU):
            setattr(model, name, nn.Sequential(child, LearnedFakeQuantize(0, 15)))
    custom = PrepareCustomConfig().set_non_traceable_module_classes([LearnedFakeQuantize])
    prepared = prepare_qat_fx(
        model.train(),
        QConfigMapping(),
        EXAMPLE,
        prepare_custom_config=custom,
        backend_config=BackendConfig("nothing is fused"),
    )
    opened, batch = FXBackend().open(prepared), models.images(64)
    assert opened.lowest_bits == 4
    with torch.no_grad(), opened.phase(Phase.FLOAT):
        assert torch.equal(opened.module(batch), opened.float_model().eval()(batch))
    models.observed(opened, batch)
    for step in opened.steps():
        step.requires_grad_(True)
    with opened.phase(Phase.TRAIN):
        opened.module(batch).square().sum().backward()
    assert all(step.grad is not None and step.grad.any() for step in opened.steps())
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        calibrated = opened.module(batch)
    opened.commit()
    quantizer = cast(LearnedFakeQuantize, prepared.get_submodule("conv2.weight_fake_quant"))
    assert quantizer.zero_point.unique().numel() > 1
    assert quantizer.scale.shape == (8,)
    rounded = quantizer(prepared.get_submodule("conv2").weight)
    assert max(channel.unique().numel() for channel in rounded) <= 16
    assert any(isinstance(each, nn.BatchNorm2d) for each in prepared.modules())
    with torch.no_grad():
        assert torch.equal(prepared.eval()(batch), calibrated)


class Stream(nn.Module):
    """Two residual sums in front of a LayerNorm, and one in front of a linear layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.one, self.two, self.three, self.four = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.one(x)
        x = torch.add(x, self.two(x))
        x = self.three(self.norm(x))
        x = x + self.four(x)
        return cast(Tensor, self.head(x.mean(1)))


def test_a_stream_is_followed_through_its_parts() -> None:
    prepared: Any = FXBackend().prepare(models.Token().eval(), models.SIZE, Scheme())
    opened, batch = FXPrepared(prepared), models.images(16)
    # three sums, two concatenations, the LayerNorm
    assert "6 calls stay in float: a stream of sums that LayerNorm reads" in opened.notes
    with torch.no_grad(), opened.phase(Phase.OBSERVE):
        opened.module(batch)
    opened.set_ranges("mse")
    code = cast(Any, opened.convert()).code
    assert "ops.quantized.add(" not in code
    assert "quantized.layer_norm" not in code


def test_readers_of_a_tensor_that_is_cut_and_joined_again_and_again() -> None:
    """Each way through the pieces is another path: 2 to the 40th."""
    graph = fx.Graph()
    node = start = graph.placeholder("x")
    for _ in range(40):
        node = graph.call_function(torch.cat, ([graph.call_function(torch.flip, (node, [0])), node],))
    last = graph.output(node)
    assert list(readers(start, lambda each: each.op == "call_function")) == [last]


def test_sums_that_a_layer_norm_reads_stay_in_float() -> None:
    """Their outliers would decide the range of the whole stream; the other sum has its integer kernel."""
    model, batch = Stream().eval(), models.images(64)
    prepared: Any = FXBackend().prepare(model, models.SIZE, Scheme())
    assert "3 calls stay in float: a stream of sums that LayerNorm reads" in FXPrepared(prepared).notes
    opened = FXPrepared(prepared)
    with torch.no_grad(), opened.phase(Phase.OBSERVE):
        opened.module(batch)
    opened.set_ranges("mse")
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake = opened.module(batch)
    converted: Any = opened.convert()
    kinds = [type(module).__name__ for module in converted.modules()]
    assert kinds.count("LayerNorm") == 1
    assert converted.code.count("ops.quantized.add(") == 1
    with torch.no_grad():
        assert (converted(batch) - fake).abs().mean() < 0.02 * fake.std()


class Again(nn.Module):
    """A layer and an activation that are called twice, the second time on values 20 times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False)
        self.act = nn.Hardswish()
        self.small, self.large = nn.Linear(8, models.CLASSES), nn.Linear(8, models.CLASSES)
        with torch.no_grad():
            self.conv.weight *= 20
            self.large.weight /= 20

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.stem(x)))
        logits: Tensor = self.small(x.mean((2, 3)))
        return logits + cast(Tensor, self.large(self.act(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize("qat", [True, False])
def test_each_call_of_a_layer_has_a_scale_of_its_own(qat: bool) -> None:
    """torch.ao keeps one scale in an integer module; of the other calls the values were saturated, or all alike."""
    model, batch = Again(), models.images(32)
    mapping = qconfig_mapping(Scheme()) if qat else users_mapping(8, observers=True)
    prepare = prepare_qat_fx if qat else prepare_fx
    prepared = prepare(model.train(qat), mapping, EXAMPLE)
    opened = FXBackend().open(prepared)
    assert any("1 repeated call of a layer" in note for note in opened.notes)  # the activation has no weights
    models.observed(opened, batch)
    with torch.no_grad():
        with opened.phase(Phase.EVALUATE):
            fake = opened.module(batch)  # without quantization where there are observers only
        converted = opened.convert()(batch)
        assert (fake - converted).abs().mean() <= (0.01 if qat else 0.05) * fake.std()
        opened.commit()
        assert torch.equal(convert_fx(prepared.eval())(batch), converted)


def test_multiply_adds_on_integers_leave_out_what_stays_in_float() -> None:
    """And count a layer as often as it runs, and the product of two integer tensors."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.up = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 3),
                nn.ConvTranspose2d(4, 4, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(self.conv(self.conv(self.stem(x))))
            return torch.matmul(x, x.transpose(2, 3)).flatten(1)

    mapping = qconfig_mapping(Scheme()).set_module_name("stem", None)
    opened = FXBackend().open(prepare_qat_fx(Twice().train(), mapping, EXAMPLE))
    models.observed(opened, EXAMPLE[0])
    side = models.SIZE[1]
    layers = 4 * 4 * 9 * ((side - 2) ** 2 + 2 * (side - 4) ** 2)
    assert (
        FXBackend().integer_macs(opened.convert(), torch.zeros(2, *models.SIZE))
        == layers + 4 * (side - 2) ** 3
    )


def test_a_layer_in_float_is_not_copied() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), norm := nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 1), norm, nn.Flatten()
    )
    mapping = qconfig_mapping(Scheme()).set_object_type(nn.GroupNorm, None)
    prepared = prepare_qat_fx(model.train(), mapping, EXAMPLE)
    opened = FXBackend().open(prepared)
    assert not any("repeated call" in note for note in opened.notes)
    assert opened.origins == {}


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


class Overwrites(nn.Module):
    """Calls that overwrite what they take, of which some is read again, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.conv = nn.ReLU6(inplace=True), nn.Conv2d(8, 8, 3, padding=1)
        self.swish, self.linear = nn.Hardswish(inplace=True), nn.Linear(8, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y = self.conv(self.act(x))
        x = x + y  # after the activation has overwritten it
        x = self.swish(self.conv(x))
        x.mul_(0.5).add_(y).__isub__(0.1)
        x = F.dropout(F.leaky_relu(x, 0.1, inplace=True), 0.5, self.training)
        x = F.dropout2d(torch.dropout(input=x, p=0.5, train=self.training), training=self.training)
        logits: Tensor = self.linear(F.elu_(x.mean((2, 3))))
        return logits


def test_a_graph_that_overwrites_and_drops_is_calibrated() -> None:
    """As README has it, on a model in training mode."""
    model, batch = Overwrites(), models.images(32)
    with torch.no_grad():
        for _ in range(30):
            model(models.images(32))
        expected = model.eval()(batch)
    prepared = prepare_qat_fx(model.train(), qconfig_mapping(Scheme()), EXAMPLE)
    opened = FXBackend().open(prepared)
    with torch.no_grad(), opened.phase(Phase.FLOAT):
        torch.testing.assert_close(opened.module(batch), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(opened.float_model().eval()(batch), expected, rtol=1e-4, atol=1e-4)
    settings = {"samples": 16, "batch_size": 8, "steps": 4, "warmup_steps": 4, "generator_width": 16}
    told: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    adadfq_plugin.calibrate(prepared, example_inputs=EXAMPLE, settings=settings, **told)
    with torch.no_grad():
        fake = prepared.eval()(batch)
        assert torch.equal(fake, prepared(batch))
        converted = convert_fx(prepared)(batch)
    assert (fake - expected).abs().mean() < 0.2 * expected.std()
    assert (fake - converted).abs().mean() < 0.05 * expected.std()


class Drops(models.Residual):
    """A network that draws, at every pixel or seldom a whole image."""

    def __init__(self, seldom: bool) -> None:
        super().__init__()
        self.seldom = seldom

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.full_like(x[:, :1, :1, :1], 0.97) if self.seldom else torch.full_like(x, 0.8)
        return super().forward(x * torch.bernoulli(kept))


@pytest.mark.parametrize("seldom", [False, True])
def test_a_graph_that_draws_random_numbers_is_refused(seldom: bool) -> None:
    prepared = prepare_qat_fx(Drops(seldom).train(), qconfig_mapping(Scheme()), EXAMPLE)
    told: dict[str, Any] = {"example_inputs": EXAMPLE, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    for teacher in (None, models.trained()):  # also where the teacher itself draws none
        for seed in range(4):
            with pytest.raises(ModelError, match="draws random numbers"):
                adadfq_plugin.calibrate(prepared, teacher=teacher, seed=seed, **told)


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


class Writes(models.Residual):
    """A write into a part of a tensor that is read again, or by a call that has no other form."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.how == "view":
            y.flatten(2).mul_(0.3)
        elif self.how == "part":
            y[:, :4].relu_()
        elif self.how == "copy":
            y = y + y.clone().relu_()
        else:
            y = y.clone().fill_(0.5)
        logits: Tensor = self.linear(self.pool(self.conv3(y)).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("how", "words"),
    [("view", "overwrites part of"), ("part", "overwrites part of"), ("fill", "no form that")],
)
def test_writes_that_cannot_be_followed_are_refused(how: str, words: str) -> None:
    prepared = prepare_qat_fx(Writes(how).train(), qconfig_mapping(Scheme()), EXAMPLE)
    before = prepared.code
    with pytest.raises(ModelError, match=words):
        FXBackend().open(prepared)
    assert prepared.code == before


@pytest.mark.parametrize("qat", [True, False])
def test_padding_by_name_converts(qat: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding="valid", dilation=2),
        nn.Flatten(),
    )
    mapping, prepare = (
        (qconfig_mapping(Scheme()), prepare_qat_fx) if qat else (users_mapping(8, observers=True), prepare_fx)
    )
    opened, batch = FXBackend().open(prepare(model.train(qat), mapping, EXAMPLE)), models.images(8)
    models.observed(opened, batch)
    with torch.no_grad():
        expected = model(batch)
        assert (opened.convert()(batch) - expected).abs().mean() < 0.05 * expected.std()


def test_a_copy_may_be_overwritten() -> None:
    model, batch = Writes("copy"), models.images(8)
    opened = FXBackend().open(prepare_qat_fx(model.train(), qconfig_mapping(Scheme()), EXAMPLE))
    with torch.no_grad(), opened.phase(Phase.FLOAT):
        torch.testing.assert_close(opened.module(batch), model.eval()(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bounds", [(0.5, 3.0), (-3.0, -0.5)])
def test_bounds_that_no_levels_keep_stay_in_the_graph(bounds: tuple[float, float]) -> None:
    """Levels include zero, whatever the range."""
    torch.manual_seed(0)
    model, x = _Inverted(nn.Hardtanh(*bounds)), torch.randn(8, 3, 8, 8)
    opened = FXPrepared(prepare_qat_fx(model.train(), qconfig_mapping(Scheme()), (x,)))
    models.observed(opened, x)
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake, exact = opened.module(x), model.eval()(x)
    assert (fake - exact).abs().mean() <= 0.05 * exact.std()
    assert (opened.convert()(x) - fake).abs().mean() <= 0.02 * fake.std()


def headed(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, models.CLASSES)).eval()


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 8, 3), nn.PReLU(8)],
        [nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 3)],
        [nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")],
    ],
    ids=["prelu", "prelu between layers", "reflected"],
)
def test_layers_with_rare_kernels_convert(layers: list[nn.Module]) -> None:
    """The one of PReLU is wrong on some CPUs, where it stays in float."""
    model, batch = headed(*layers), models.images(64)
    opened = FXBackend().open(FXBackend().prepare(model, models.SIZE, Scheme()))
    assert not models.told(opened) or " stays in float: the integer kernel is wrong" in models.told(opened)[0]
    models.observed(opened, batch)
    converted = opened.convert()
    assert [each for each in converted.modules() if isinstance(each, nnq.Conv2d)]
    with torch.no_grad():
        assert (converted(batch) - model(batch)).abs().mean() <= 0.05 * model(batch).std()


@pytest.mark.parametrize(
    ("prepare", "mapping"),
    [
        (prepare_qat_fx, qconfig_mapping(Scheme()).set_object_type(nn.Linear, default_dynamic_qat_qconfig)),
        (prepare_qat_fx, QConfigMapping().set_global(default_dynamic_qconfig)),
        (prepare_fx, QConfigMapping().set_global(default_dynamic_qconfig)),
    ],
    ids=["one layer's", "all", "all, observed"],
)
def test_a_range_of_each_batch_is_refused(prepare: Any, mapping: QConfigMapping) -> None:
    prepared = prepare(models.trained().train(prepare is prepare_qat_fx), mapping, EXAMPLE)
    with pytest.raises(ModelError, match="takes the range of each batch"):
        FXBackend().open(prepared)


def test_a_function_does_not_take_the_name_of_a_layer() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.linear = nn.Parameter(torch.rand(6, 8)), nn.Linear(6, models.CLASSES)
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.leaky_relu_(self.conv(x), 0.1).mean((2, 3))
            return cast(Tensor, self.linear(nn.functional.linear(x, self.w)))

    model, batch = Named().eval(), models.images(8)
    traced = traceable(model, models.SIZE)
    with torch.no_grad():
        torch.testing.assert_close(traced(batch), model(batch))


def test_functional_modules_of_a_float_network_are_no_conversion() -> None:
    class Adds(models.Residual):
        def __init__(self) -> None:
            super().__init__()
            self.add = nnq.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.relu(self.add.add(self.bn2(self.conv2(x)), x))
            return cast(Tensor, self.linear(self.pool(self.relu(self.bn3(self.conv3(x)))).flatten(1)))

    assert not FXBackend().recognises(Adds())
    with pytest.raises(ModelError, match="is not prepared"):
        FXBackend().open(Adds())


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


class HalfTied(nn.Module):
    """A quantized layer and one in float that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.other.weight, self.linear = self.one.weight, nn.Linear(8, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.one(self.stem(x).relu()).relu()).relu()
        return cast(Tensor, self.linear(x.mean((2, 3))))


def test_a_layer_in_float_that_shares_a_weight_is_none_of_the_quantized() -> None:
    mapping = qconfig_mapping(Scheme(weight_bits=4)).set_module_name("other", None)
    opened = FXBackend().open(prepare_qat_fx(HalfTied().train(), mapping, EXAMPLE))
    models.observed(opened, batch := models.images(16))
    calls: list[tuple[int, int]] = []
    round_weights(
        opened, opened.reference(), batch, torch.Generator().manual_seed(0), lambda *each: calls.append(each)
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]


class Dilated(nn.Module):
    """One weight read by a layer with a BatchNorm, and by a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.linear = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        one = self.bn1(self.conv(x)).relu()
        other = self.bn2(F.conv2d(x, self.conv.weight, padding=2, dilation=2)).relu()
        return cast(Tensor, self.linear((one + other).mean((2, 3))))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_weight_that_is_read_again_is_the_one_of_before_folding(quantized: bool) -> None:
    model, batch = models._seen(Dilated(), nn.Linear(1, 1), 5), models.images(16)
    mapping = users_mapping(8)
    if not quantized:
        mapping.set_object_type(F.conv2d, None)
    opened = FXBackend().open(prepare_qat_fx(copy.deepcopy(model).train(), mapping, EXAMPLE))
    with torch.no_grad(), opened.phase(Phase.FLOAT):
        exact = model(batch)
        torch.testing.assert_close(opened.module(batch), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(opened.float_model().eval()(batch), exact, rtol=1e-4, atol=1e-5)


def test_an_embedding_has_torch_aos_own_quantizer() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.positions = nn.Conv2d(3, 8, 4, stride=4), nn.Embedding(16, 8)
            self.linear = nn.Linear(8, 5)
            self.register_buffer("places", torch.arange(16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).flatten(2).transpose(1, 2) + self.positions(self.places)
            return cast(Tensor, self.linear(x.mean(1)))

    model = Positions().eval()
    mapping = users_mapping(8).set_object_type(nn.Embedding, default_embedding_qat_qconfig)
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), mapping, EXAMPLE)
    told: dict[str, Any] = {"input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    sizes = {
        "samples": 16,
        "steps": 2,
        "warmup_steps": 2,
        "refine_steps": 1,
        "range_samples": 16,
        "batch_size": 8,
    }
    adadfq_plugin.calibrate(prepared, settings={**sizes, "generator_width": 16}, **told)
    converted = convert_fx(copy.deepcopy(prepared.eval()))
    assert isinstance(converted.positions, nnq.Embedding)
    batch = models.images(16)
    with torch.no_grad():
        exact = model(batch)
        assert (converted(batch) - exact).abs().mean() <= 0.1 * exact.std()


@pytest.mark.parametrize("which", ["input", "output"])
def test_models_that_take_or_give_integers_are_refused(which: str) -> None:
    custom = PrepareCustomConfig()
    getattr(custom, f"set_{which}_quantized_indexes")([0])
    prepared = prepare_qat_fx(
        models.trained().train(), users_mapping(8), EXAMPLE, prepare_custom_config=custom
    )
    with pytest.raises(ModelError, match=rf"prepared with set_{which}_quantized_indexes\(\[0\]\)"):
        FXBackend().open(prepared)


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norms_of_transposed_convolutions_are_folded(bias: bool) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, bias=bias), nn.BatchNorm2d(6)),
        *(nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )  # fmt: skip
    model, batch = models._seen(model, nn.Linear(1, 1), 5), models.images(16)
    opened = FXBackend().open(FXBackend().prepare(model, models.SIZE, Scheme()))
    assert not any(isinstance(each, nn.BatchNorm2d) for each in opened.module.modules())
    with torch.no_grad(), opened.phase(Phase.FLOAT):
        torch.testing.assert_close(opened.module(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_calls_that_write_no_values_are_left_alone() -> None:
    class Asking(models.Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.requires_grad_())

    opened = FXBackend().open(prepare_qat_fx(Asking().train(), users_mapping(8), EXAMPLE))
    models.observed(opened, models.images(4))


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


@pytest.mark.parametrize("width", [8, 6])
def test_a_call_is_tried_for_each_engine_that_may_run_it(width: int) -> None:
    """fbgemm's kernel is wrong for one width, oneDNN's for the other."""
    if not {"onednn", "x86"} <= set(torch.backends.quantized.supported_engines):
        pytest.skip("no two engines for one CPU in this build of torch")
    layers = nn.ConvTranspose2d(8, width, 2, stride=2), nn.ReLU(), nn.Conv2d(width, 8, 1)
    model, batch = headed(nn.Conv2d(3, 8, 3), *layers), models.images(32)
    prepared = FXBackend().prepare(model, models.SIZE, Scheme(engine="onednn"))
    opened = FXBackend().open(prepared)
    models.observed(opened, batch)
    opened.commit()
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake = opened.module(batch)
    for engine in ("onednn", "x86"):
        with torch.no_grad(), using_engine(engine):
            converted = convert_fx(cast(fx.GraphModule, copy.deepcopy(prepared).eval()))(batch)
        assert (converted - fake).abs().mean() <= 0.05 * fake.std(), engine


def test_a_model_is_saved_for_its_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine of the moment is, for freezing packs the weights."""
    engines = torch.backends.quantized.supported_engines
    first, other = [each for each in ("onednn", "qnnpack", "x86") if each in engines][:2]
    opened = FXBackend().open(FXBackend().prepare(models.trained(), models.SIZE, Scheme(engine=first)))
    models.observed(opened, batch := models.images(8))
    converted, seen, freeze = opened.convert(), [], torch.jit.freeze

    def frozen(script: Any) -> Any:
        seen.append(torch.backends.quantized.engine)
        return freeze(script)

    monkeypatch.setattr(torch.jit, "freeze", frozen)
    with using_engine(other):
        FXBackend().save(converted, batch[:1], tmp_path / "net.pt")
    assert seen == [first]


def test_what_torch_ao_does_not_look_into_stays_in_float() -> None:
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.linear = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, models.CLASSES)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return cast(Tensor, self.linear(self.encoder(x).mean(1)))

    model, batch = Encoded().eval(), models.images(32)
    prepared = FXBackend().prepare(model, models.SIZE, Scheme(weight_bits=4, activation_bits=4))
    opened = FXBackend().open(prepared)
    assert models.told(opened) == ["encoder stays in float: torch.ao does not look into it"]
    assert not [
        each for each in prepared.get_submodule("encoder").modules() if hasattr(each, "weight_fake_quant")
    ]
    own = FXBackend().open(prepare_qat_fx(copy.deepcopy(model).train(), qconfig_mapping(Scheme()), EXAMPLE))
    for each in (opened, own):
        models.observed(each, batch)
        with torch.no_grad(), each.phase(Phase.EVALUATE):  # its fast path, in both
            fake, converted = each.module(batch), each.convert()(batch)
        assert (converted - fake).abs().mean() <= 0.05 * fake.std()


def test_repeated_calls_are_counted_without_their_normalisation() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.norm, self.linear = nn.BatchNorm2d(8), nn.Linear(8, models.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(3):
                x = self.norm(self.conv(x)).relu()
            return cast(Tensor, self.linear(x.mean((2, 3))))

    opened = FXBackend().open(FXBackend().prepare(Thrice().eval(), models.SIZE, Scheme()))
    assert [note for note in opened.notes if note.startswith("2 repeated calls of layers")]


def test_buffers_that_a_network_changes_come_back() -> None:
    class Counts(models.Residual):
        def __init__(self) -> None:
            super().__init__()
            self.count: Tensor
            self.seen: Tensor
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen = self.seen + x.abs().mean()
            return super().forward(x)

    model = Counts().eval()
    told: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "method": "noise", "teacher": model}
    prepared = adadfq_plugin.prepare(model, models.SIZE)
    with pytest.raises(ModelError, match="num_classes=7"):
        adadfq_plugin.calibrate(prepared, num_classes=7, **told)
    settings = {"samples": 8, "batch_size": 4, "steps": 1, "range_samples": 8}
    adadfq_plugin.calibrate(prepared, settings=settings, **told)
    assert (model.count.item(), model.seen.item()) == (0, 0)


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
            x = self.up(x) if module else F.interpolate(x, (31, 30), None, "bilinear", False)
            return cast(Tensor, self.linear(self.conv(x).relu().mean((2, 3))))

    torch.manual_seed(0)
    opened = FXBackend().open(FXBackend().prepare(Enlarged().eval(), models.SIZE, Scheme(activation_bits=4)))
    models.observed(opened, batch := models.images(32))
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake = opened.module(batch)
        assert (opened.convert()(batch) - fake).abs().max() <= 0.01 * fake.std()
