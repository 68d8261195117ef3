"""The FX-friendly rewrite: exact, for any batch size, and torch.ao takes it."""

import copy
import operator
from collections.abc import Callable
from typing import Any, cast

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn import intrinsic
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import (
    FakeQuantize,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    default_per_channel_weight_fake_quant,
    disable_observer,
    get_default_qat_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import adadfq_plugin
from adadfq_plugin.backends.fx import FXBackend
from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.traceable import traceable
from adadfq_plugin.backends.fx.trial import _Trial
from adadfq_plugin.backends.fx.unquantizable import leave_in_float, unquantizable
from adadfq_plugin.config import Scheme
from adadfq_plugin.contracts import Phase
from adadfq_plugin.errors import UntraceableError
from adadfq_plugin.facts import SIZE

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("seeded")


def randomised(model: nn.Module) -> nn.Module:
    """Give vectors that are zero or one at the start other values: nothing may hide behind them."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(images.clone())
    return output


def kinds(traced: fx.GraphModule) -> set[type]:
    return {type(traced.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module"}


def functions(traced: fx.GraphModule) -> set[Any]:
    return {node.target for node in traced.graph.nodes if node.op in ("call_function", "call_method")}


MODELS = [
    ("test_resnet", 64),
    ("test_efficientnet", 64),
    ("test_efficientnet_gn", 64),
    ("test_mambaout", 64),
    ("test_byobnet", 64),
    ("test_convnext", 64),
    ("test_nfnet", 64),
    ("test_vit", 160),
    ("tf_efficientnet_lite0", 95),
    ("tf_mixnet_s", 64),
    ("resnetv2_18", 64),
    ("maxvit_pico_rw_256", 256),
    ("swinv2_cr_tiny_ns_224", 224),
]


@pytest.mark.parametrize(("name", "side"), MODELS)
def test_same_outputs_at_other_batch_sizes(name: str, side: int) -> None:
    model = randomised(timm.create_model(name, num_classes=7))
    traced = traceable(model, side, check=False)
    for batch in (1, 5):
        images = torch.randn(batch, 3, side, side)
        torch.testing.assert_close(outputs(traced, images), outputs(model, images), rtol=1e-4, atol=1e-4)


def test_the_users_model_comes_back_untouched() -> None:
    model = randomised(timm.create_model("test_efficientnet")).train()
    model.get_submodule("blocks.0").eval()
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    traced = traceable(model, 64)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == {
        name: set(values) for name, values in attributes.items()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        for parameter in traced.parameters():
            parameter.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_keeps_what_belongs_to_the_model() -> None:
    model = timm.create_model("test_resnet").train()
    traced = traceable(model, 64)
    assert traced.meta[SIZE] == (3, 64, 64)
    assert traced.pretrained_cfg == model.pretrained_cfg
    assert traced.num_classes == model.num_classes
    assert traced.training
    assert not traceable(model.eval(), 64).training
    ours, theirs = traced.state_dict(), model.state_dict()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_batch_norm_learns_in_training_mode() -> None:
    model = timm.create_model("test_efficientnet").train()  # BatchNormAct2d throughout
    traced = traceable(model, 64)
    images = torch.randn(4, 3, 64, 64)
    for network in (model, traced):
        with torch.no_grad():
            network(images)
    ours, theirs = dict(traced.named_buffers()), dict(model.named_buffers())
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name)
    assert int(ours["bn1.num_batches_tracked"]) == 1


def test_gradients_reach_the_same_parameters() -> None:
    model = timm.create_model("test_resnet")
    traced = traceable(model, 64)
    images = torch.randn(3, 3, 64, 64)
    gradients: list[dict[str, Tensor | None]] = []
    for network in (model, traced):
        network.eval()(images).square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters()})
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_padding_batch_norm_and_standardised_weights_become_standard_modules() -> None:
    tf = traceable(timm.create_model("tf_efficientnet_lite0"), 95)
    assert kinds(tf) <= {nn.Conv2d, nn.BatchNorm2d, nn.ReLU6, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    assert F.conv2d not in functions(tf)
    assert tf.get_submodule("conv_stem").padding == (1, 1)  # 95 pixels at stride 2 need one on each side
    nf = traceable(timm.create_model("test_nfnet"), 64)
    assert F.conv2d not in functions(nf)
    assert F.batch_norm not in functions(nf)
    assert not any("gain" in name for name in nf.state_dict())


def test_same_padded_max_pooling_pads_itself() -> None:
    from timm.layers.pool2d_same import MaxPool2dSame

    for side in (16, 17):
        model = nn.Sequential(MaxPool2dSame(3, 2), nn.Conv2d(3, 4, 1), nn.Flatten())
        traced = traceable(model, side)
        assert F.pad not in functions(traced)
        images = -torch.rand(2, 3, side, side)  # zeros in the padding would win
        torch.testing.assert_close(outputs(traced, images), outputs(model, images))


class Windows(nn.Module):
    """Batch size in every dimension: windows, a loop over channels, item assignment, in-place sums, a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = F.pad(x, (0, -width % 4, 0, -height % 4))
        shortcut = x = x - 0.1
        x = self.act(x)
        x = x + shortcut  # of the value after the activation: it works in place
        height, width = x.shape[2:]
        x = x.view(batch, 3, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5)
        windows = x.reshape(-1, 4, 4)
        assert windows.shape[0] == batch * 3 * (height // 4) * (width // 4)
        windows = self.project(windows) * (self.scale / self.scale.sum()).view(1, 1, 4)
        windows = windows.reshape(windows.size(0) // 3, -1)
        extra = torch.zeros(batch, windows.shape[1])
        extra[:, 0] = windows.reshape(batch, -1).mean(1)
        extra += 1
        if batch > 0 and windows.dim() == 2:
            windows = torch.cat([windows, extra])
        return torch.stack([chunk.sum(1) for chunk in windows.chunk(3, dim=1)], dim=1)


def test_control_flow_on_shapes_and_a_free_batch_size() -> None:
    model = Windows()
    traced = traceable(model, 10)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 10, 10)
        torch.testing.assert_close(outputs(traced, images), outputs(model, images))
    again = fx.symbolic_trace(traced)  # torch's own tracer takes the result
    torch.testing.assert_close(outputs(again, images), outputs(model, images))


def test_nothing_leaks_from_one_trace_into_the_next() -> None:
    traceable(Windows(), 10)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert len(fx.symbolic_trace(conv).graph.nodes) == 4


class Refused(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.block = nn.Module()
        self.block.forward = forward

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(self.stem(x))
        return result


def on_values(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def on_batch(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == 2 else x


def length_of_batch(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def view_in_place(x: Tensor) -> Tensor:
    x[:, 0].mul_(2)
    return x + 1


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (on_values, "reads the values"),
        (on_batch, "another batch size"),
        (length_of_batch, r"take shape\[0\]"),
        (view_in_place, "views was changed in place"),
        (lambda x: torch.from_numpy(x.numpy()), "numpy"),
    ],
)
def test_refusal_names_module_reason_and_way_out(forward: Any, reason: str) -> None:
    with pytest.raises(UntraceableError, match=reason) as caught:
        traceable(Refused(forward), 8)
    assert "'block' (Module)" in str(caught.value)
    assert "PT2E" in str(caught.value)


def test_check_finds_what_escapes_the_trace() -> None:
    def hidden(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            constant = x.mean()
        return x * constant

    traceable(Refused(hidden), 8, check=False)
    with pytest.raises(UntraceableError, match="not what its trace computes"):
        traceable(Refused(hidden), 8)


def seven_bits() -> QConfigMapping:
    """The x86 default without moving averages: extremes of what was seen, and plain fake quantization."""
    activation = FakeQuantize.with_args(
        observer=MinMaxObserver, quant_min=0, quant_max=255, reduce_range=True
    )
    weight = default_per_channel_weight_fake_quant
    return get_default_qat_qconfig_mapping("x86").set_global(QConfig(activation=activation, weight=weight))


def converted_and_error(traced: fx.GraphModule, mapping: QConfigMapping) -> tuple[fx.GraphModule, float]:
    """Prepare, calibrate, convert; the relative error of the converted model against the fake-quantized one."""
    side = traced.meta[SIZE][-1]
    images = torch.randn(4, 3, side, side)
    prepared = prepare_qat_fx(traced.train(), mapping, (images,))
    for module in prepared.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    prepared(images)
    for module in prepared.modules():
        if isinstance(module, (MinMaxObserver, PerChannelMinMaxObserver)):
            module.reset_min_max_vals()
    outputs(prepared, images)
    prepared.apply(disable_observer)
    expected = outputs(prepared, images)
    converted = convert_fx(prepared)
    return converted, float((outputs(converted, images) - expected).norm() / expected.norm())


def fake_and_converted(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Outputs of the calibrated model at W8A8 and of the integer one, and the notes."""
    opened = FXBackend().open(FXBackend().prepare(model.eval(), (3, *images.shape[2:]), Scheme(engine="x86")))
    models.observed(opened, images)
    with torch.no_grad(), opened.phase(Phase.EVALUATE):
        fake = opened.module(images)
    return fake, outputs(opened.convert(), images), models.told(opened)


def test_torch_ao_fuses_batch_norm_and_activation() -> None:
    traced = traceable(randomised(timm.create_model("test_resnet", num_classes=10)), 64)
    converted, error = converted_and_error(traced, seven_bits())
    assert error < 0.2
    assert any(isinstance(module, intrinsic.quantized.ConvReLU2d) for module in converted.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())


class Unsuitable(nn.Module):
    """Three things that torch.ao quantizes though it should not, and one that it should."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3)
        self.grouped = nn.Conv2d(48, 192, 3, groups=2)  # wrong in oneDNN
        self.token = nn.Parameter(torch.full((1, 1, 8, 8), 30.0))
        self.head = nn.Linear(193 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x))
        x = F.interpolate(x, size=(8, 8), mode="bicubic")  # no integer kernel
        x = torch.cat([torch.cat([self.token.expand(x.shape[0], -1, -1, -1), x.permute(0, 1, 3, 2)], 1)])
        logits: Tensor = self.head(F.max_pool2d(x, 2).flatten(1))
        return logits


def test_unquantizable_parts_are_found_and_left_in_float() -> None:
    traced, mapping = traceable(Unsuitable(), 12), seven_bits()
    before, code = copy.deepcopy(traced.state_dict()), traced.code
    model, extended, sites = leave_in_float(traced, mapping)
    assert "torch.nn.functional.interpolate" in {site.target for site in sites}
    assert not mapping.module_name_qconfigs
    assert traced.code == code
    assert all(torch.equal(value, before[name]) for name, value in traced.state_dict().items())
    images = torch.randn(3, 3, 12, 12)
    torch.testing.assert_close(outputs(model, images), outputs(traced, images))
    converted, error = converted_and_error(model, extended)
    assert error < 0.2
    assert isinstance(converted.get_submodule("stem"), nnq.Conv2d)
    assert isinstance(converted.get_submodule("head"), nnq.Linear)


def test_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = traceable(Unsuitable(), 12)
    right = nnq.Conv2d.forward

    def wrong(self: nnq.Conv2d, x: Tensor) -> Tensor:
        y: Tensor = right(self, x)  # type: ignore[no-untyped-call]  # as oneDNN's for some grouped convolutions
        return (
            torch.quantize_per_tensor(-y.dequantize(), y.q_scale(), y.q_zero_point(), y.dtype)
            if self.groups == 2
            else y
        )

    monkeypatch.setattr(nnq.Conv2d, "forward", wrong)
    _, extended, sites = leave_in_float(traced, seven_bits())
    assert "grouped" in {site.target for site in sites}
    assert dict(extended.module_name_qconfigs) == {"grouped": None}


class Bounded(nn.Module):
    """A layer between bounds that it keeps as tensors, infinite until a checkpoint brings others."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.tensor(-bound))
        self.register_buffer("high", torch.tensor(bound))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(self.conv(x), self.low, max=self.high)
        x = x.clamp_(self.low, self.high)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("bound", [0.5, float("inf")])
def test_bounds_that_are_tensors_become_numbers(bound: float) -> None:
    model, images = Bounded(bound).eval(), torch.randn(4, 3, 12, 12)
    traced = traceable(model, 12)
    torch.testing.assert_close(outputs(traced, images), outputs(model, images))
    assert bool({torch.clamp, "clamp"} & functions(traced)) == (bound == 0.5)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]
    prepared = adadfq_plugin.prepare(model, 12)
    settings = {"samples": 4, "batch_size": 2, "steps": 1}
    adadfq_plugin.calibrate(prepared, method="noise", settings=settings, mean=(0.5,) * 3, std=(0.5,) * 3)
    fake = outputs(prepared, images)
    converted = convert_fx(cast(fx.GraphModule, prepared.eval()))
    assert (converted(images) - fake).abs().max() < 0.1 * fake.std()


class Squeezed(nn.Module):
    """The two ways in which timm writes a global average."""

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        logits: Tensor = (x * gate).mean(dim=[-2, -1])
        return logits


def test_global_averages_are_poolings_which_have_an_exact_kernel() -> None:
    traced, images = traceable(Squeezed(), 12), torch.randn(4, 3, 12, 12)
    assert {F.adaptive_avg_pool2d, "mean"} <= functions(traced)  # torch.ao's pooling keeps the dimensions
    torch.testing.assert_close(outputs(traced, images), outputs(Squeezed(), images))


@pytest.mark.parametrize(
    ("pooling", "is_global"),
    [
        (nn.AvgPool2d(12), True),
        (nn.AvgPool2d((12, 12), stride=1), True),
        (nn.AvgPool2d(12, divisor_override=7), False),
        (nn.AvgPool2d(12, padding=1), False),
        (nn.AvgPool2d(11), False),
        (nn.AvgPool2d((12, 6)), False),
    ],
)
def test_poolings_over_the_whole_map_are_global_averages(pooling: nn.AvgPool2d, is_global: bool) -> None:
    traced, images = traceable(nn.Sequential(pooling, nn.Flatten()), 12), torch.randn(4, 3, 12, 12)
    assert (F.adaptive_avg_pool2d in functions(traced)) == is_global
    torch.testing.assert_close(outputs(traced, images), pooling(images).flatten(1))


class Averaged(nn.Module):
    """Three ways to write the same average."""

    def __init__(self, average: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.average, self.linear = nn.Conv2d(3, 8, 3), average, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.average(self.conv(x).relu()))
        return result


@pytest.mark.parametrize(
    "average",
    [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, [2, 3]),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    ],
    ids=["method", "function", "pooling"],
)
def test_an_average_has_levels_of_its_own(average: Callable[[Tensor], Tensor]) -> None:
    prepared: Any = FXBackend().prepare(
        Averaged(average).eval(), models.SIZE, Scheme(weight_bits=4, activation_bits=4)
    )
    opened = FXBackend().open(prepared)
    models.observed(opened, models.images(32))
    scales = {
        float(each.scale)
        for each in opened.module.modules()
        if isinstance(each, LearnedFakeQuantize) and not each.per_channel
    }
    assert len(scales) == 4  # input, convolution, average, logits


class Weighted(nn.Module):
    """Weights that are computed when they are needed: their memory, and their ids, are used again."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(3, 3, 3, 3) / 5) for _ in range(32)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.conv2d(x, weight * 2.0, padding=1)
        return x.mean((2, 3))


def test_computed_weights_are_not_taken_for_each_other() -> None:
    model, images = Weighted().eval(), torch.randn(2, 3, 8, 8)
    traced = traceable(model, 8)
    torch.testing.assert_close(outputs(traced, images), outputs(model, images))


class Normalised(nn.Module):
    """Attention without softmax: a sum that is small, never zero, is what the values are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        total = x.sum(1, keepdim=True) + 1e-6
        logits: Tensor = (x / total).mean((2, 3))
        return logits


def test_what_is_divided_by_is_not_rounded_to_zero() -> None:
    traced = traceable(Normalised(), 12)
    model, mapping, sites = leave_in_float(traced, seven_bits())
    assert [(site.target, site.reason.split(",")[0]) for site in sites] == [
        ("_operator.add", "gives a denominator")
    ]
    images = torch.randn(16, 3, 12, 12)
    images[0] = 0  # every place but the border has the same small sum, or none
    prepared = prepare_qat_fx(model.train(), mapping, (images,))
    prepared(images * 100)
    assert outputs(prepared.eval(), images).isfinite().all()
    assert convert_fx(prepared)(images).isfinite().all()


class Rescaled(nn.Module):
    """Pixels from a range of 1 to one of 255, as a stem that computes with colours has them; and a sum in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        total: Any = 0
        for each in (x, x.relu()):
            total = total + each
        logits: Tensor = self.head(((total * 255 + 64) * 1.0 - 64).mean((2, 3)) / 255)
        return logits


def test_a_product_with_a_number_does_not_share_the_levels_of_its_tensor() -> None:
    """Of the 256 levels of [-200, 400] torch.ao leaves one or two to the values before they are scaled."""
    model, images = Rescaled(), torch.randn(16, 3, 12, 12)
    traced = traceable(model, 12)
    torch.testing.assert_close(outputs(traced, images), outputs(model, images))
    arithmetic = [node.args[1] for node in traced.graph.nodes if node.target in (operator.add, operator.mul)]
    assert [each for each in arithmetic if not isinstance(each, fx.Node)] == [255, 64]  # not 0, not 1
    sites = unquantizable(traced, seven_bits())
    assert [(site.target, site.index) for site in sites] == [("_operator.mul", 0), ("_operator.add", 1)]
    expected = outputs(model, images)
    fake, converted, _ = fake_and_converted(model, images)
    assert (fake - expected).abs().mean() < 0.1 * expected.std()
    assert (converted - fake).abs().mean() < 0.02 * fake.std()


class Joined(nn.Module):
    """Two branches that a function joins."""

    def __init__(self, join: Any) -> None:
        super().__init__()
        self.one, self.two, self.join = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), join

    def forward(self, x: Tensor) -> Tensor:
        joined: Tensor = self.join(self.one(x), self.two(x))
        return joined.relu().flatten(2).mean(2)


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: torch.add(input=x, other=y, alpha=-1),
        lambda x, y: torch.mul(x, other=y),
        lambda x, y: torch.matmul(x, other=y),
    ],
    ids=["add", "all by keyword", "mul", "matmul"],
)
def test_keywords_of_arithmetic_are_kept(join: Any) -> None:
    """torch.ao's lowering drops them: alpha without an error, operands with one (torch 2.14)."""
    model, images = Joined(join), torch.randn(8, 3, 12, 12)
    expected = outputs(model, images)
    fake, converted, notes = fake_and_converted(model, images)
    assert notes == []
    assert (fake - expected).abs().mean() < 0.1 * expected.std()
    assert (converted - fake).abs().mean() < 0.02 * fake.std()


class Enlarged(nn.Module):
    """One place for a whole image is enlarged to its size."""

    def __init__(self, enlarge: Any) -> None:
        super().__init__()
        self.conv, self.gate, self.enlarge = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), enlarge

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        everywhere: Tensor = self.enlarge(self.gate(x.mean((2, 3))).reshape(-1, 8, 1, 1))
        return (F.hardswish(x) + everywhere).relu().flatten(2).mean(2)


@pytest.mark.parametrize(
    ("name", "enlarge"),
    [
        ("interpolate", lambda x: F.interpolate(x, size=(10, 10))),
        ("interpolate", lambda x: F.interpolate(x, size=(10, 10), mode="bilinear")),
    ],
    ids=["nearest", "bilinear"],
)
def test_every_call_is_compared_with_its_float_form(name: str, enlarge: Any) -> None:
    """Integer kernels take one place for channels last whatever its strides, and mix the channels (torch 2.14)."""
    fake, converted, (note,) = fake_and_converted(Enlarged(enlarge), torch.randn(8, 3, 12, 12))
    assert note.startswith(f"torch.nn.functional.{name} stays in float: the integer kernel is wrong: ")
    assert (converted - fake).abs().mean() < 0.02 * fake.std()


@pytest.mark.parametrize("add", [torch.add, operator.add], ids=["torch", "operator"])
def test_wrong_sums_stay_in_float_by_either_name(add: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The integer kernel is the same, and its name has to lead back to the call."""
    exact = _Trial._exact

    def off(self: Any, node: Any, args: Any, kwargs: Any) -> Any:
        result: Any = exact(self, node, args, kwargs)
        return result + 100 if node.target is torch.ops.quantized.add else result

    monkeypatch.setattr(_Trial, "_exact", off)
    fake, converted, (note,) = fake_and_converted(Joined(add), torch.randn(8, 3, 12, 12))
    assert "add stays in float: the integer kernel is wrong" in note
    assert (converted - fake).abs().mean() < 0.02 * fake.std()


def test_suitable_models_have_no_unquantizable_parts() -> None:
    traced = traceable(timm.create_model("test_resnet"), 64)
    assert unquantizable(traced, seven_bits()) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_class_token_is_joined_in_float(seed: int) -> None:
    """It belongs to the stream; the patches are a view of what a convolution gives: the same range, two quantizers."""
    torch.manual_seed(seed)
    model, images = timm.create_model("test_vit", num_classes=10).eval(), torch.randn(4, 3, 160, 160)
    prepared = adadfq_plugin.prepare(model, 160, scheme=Scheme(engine="x86"))
    assert models.told(FXBackend().open(prepared)) == [
        "27 calls stay in float: a stream of sums that LayerNorm reads"
    ]
    settings = {"samples": 4, "batch_size": 2, "steps": 2}
    adadfq_plugin.calibrate(prepared, method="noise", settings=settings, mean=(0.5,) * 3, std=(0.5,) * 3)
    fake = outputs(prepared, images)
    converted = convert_fx(cast(fx.GraphModule, prepared.eval()))
    assert (outputs(converted, images) - fake).abs().mean() < 0.1 * fake.std()
    assert models.joined(converted, images) == [set()]


class Prefixed(nn.Module):
    """A token in front of the patches, which are a view of what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return cast(Tensor, self.head(x)).mean(1)


def test_tensors_that_share_no_levels_are_joined_in_float() -> None:
    """The same range, yet two quantizers; no LayerNorm reads them."""
    fake, converted, notes = fake_and_converted(Prefixed(), torch.randn(8, 3, 12, 12))
    assert notes == ["torch.cat stays in float: joins tensors with different quantization parameters"]
    assert (converted - fake).abs().mean() < 0.02 * fake.std()


class Dense(nn.Module):
    """Two tensors with levels of their own, concatenated in front of a BatchNorm that can't be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.one(x), self.two(x)], 1)).relu()
        return cast(Tensor, self.head(x)).mean((2, 3))


def test_normalisation_of_integers_is_compared_in_evaluation_mode() -> None:
    model, images = Dense(), torch.randn(16, 3, 12, 12)
    for _ in range(50):
        model(images)
    fake, converted, notes = fake_and_converted(model, images)
    assert notes == []
    assert (converted - fake).abs().mean() < 0.02 * fake.std()
