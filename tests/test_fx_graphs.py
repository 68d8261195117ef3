"""The FX backend: graphs that torch.ao can't follow as they are, rewritten exactly."""

from __future__ import annotations

import copy
from typing import Any, cast

import models
import pytest
import torch
import torch.nn.functional as F
from fx_models import EXAMPLE, Functional, fake_and_converted, headed, levels_of_weights, users_mapping
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.observer import NoopObserver
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import adadfq_plugin
from adadfq_plugin.backends.fx import FXBackend, FXPrepared, qconfig_mapping, traceable, using_engine
from adadfq_plugin.backends.fx import prepared as prepared_module
from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.folding import float_copy, fold_batch_norm
from adadfq_plugin.config import Scheme
from adadfq_plugin.contracts import Phase
from adadfq_plugin.errors import ModelError
from adadfq_plugin.game.rounding import round_weights
from adadfq_plugin.streams import readers

pytestmark = pytest.mark.usefixtures("seeded")


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
    lengths = {"warmup_steps": 4, "refine_steps": 4, "steps": 4}
    settings = {**lengths, "samples": 16, "batch_size": 8, "generator_width": 16}
    told: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    adadfq_plugin.calibrate(prepared, example_inputs=EXAMPLE, settings=settings, **told)
    with torch.no_grad():
        fake = prepared.eval()(batch)
        assert torch.equal(fake, prepared(batch))
        converted = convert_fx(prepared)(batch)
    assert (fake - expected).abs().mean() < 0.2 * expected.std()
    assert (fake - converted).abs().mean() < 0.05 * expected.std()


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


class Unpools(nn.Module):
    """Puts values back where a maximum was taken from."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.conv, self.functional = nn.Conv2d(3, 8, 3, padding=1), functional
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.linear = nn.Linear(8, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        values, places = F.max_pool2d(x, 2, return_indices=True) if self.functional else self.pool(x)
        return cast(Tensor, self.linear(self.unpool(values, places).mean((2, 3))))


@pytest.mark.parametrize("functional", [False, True])
def test_a_maximum_that_tells_its_places_stays_in_float(functional: bool) -> None:
    model = Unpools(functional).eval()
    prepared = FXBackend().prepare(model, models.SIZE, Scheme())
    opened, batch = FXBackend().open(prepared), models.images(32)
    assert any("gives places as well" in line for line in models.told(opened))
    models.observed(opened, batch)
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake, converted = opened.module(batch), opened.convert()(batch)
    assert (fake - converted).abs().max() < 0.1 * fake.std()


def test_a_quantizer_of_several_tensors_is_refused() -> None:
    prepared = prepare_qat_fx(Unpools(False).train(), users_mapping(8), EXAMPLE)
    before = models.state(prepared)
    with pytest.raises(ModelError, match=r"gives a tuple and no tensor.*no QConfig"):
        adadfq_plugin.calibrate(prepared, input_size=models.SIZE, mean=[0.0] * 3, std=[1.0] * 3)
    assert models.same(before, models.state(prepared))
