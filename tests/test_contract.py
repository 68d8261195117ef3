"""What every backend promises, backend by backend and network by network."""

from __future__ import annotations

import contextlib
import copy
import functools
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import models
import pytest
import torch
from torch import Tensor, nn

import adadfq_plugin
from adadfq_plugin import api, choice
from adadfq_plugin.config import Scheme
from adadfq_plugin.contracts import Backend, Phase, Prepared
from adadfq_plugin.errors import DataError, ModelError
from adadfq_plugin.game.biases import SteadyMeans
from adadfq_plugin.game.layers import Call, Layer, Layers
from adadfq_plugin.game.rounding import round_weights
from adadfq_plugin.teacher import multiply_adds

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python"),  # torch.jit.trace
]
QUICK: dict[str, Any] = {
    "samples": 16, "batch_size": 8, "steps": 4, "range_samples": 16, "warmup_steps": 4, "refine_steps": 4,
    "latent_dim": 8, "generator_width": 16,
}  # fmt: skip
TOLD: dict[str, Any] = {"input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "settings": QUICK}
NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual": models.trained, "inverted": models.inverted}


@pytest.fixture(params=["fx", "pt2e"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "pt2e":
        pytest.importorskip("torchao", reason="backend pt2e needs torchao")
    return api.backends().get(request.param)


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> str:
    return cast(str, request.param)


@functools.cache
def _prepared(backend: str, network: str, bits: int) -> nn.Module:
    scheme = Scheme(weight_bits=bits, activation_bits=bits)
    return api.backends().get(backend).prepare(NETWORKS[network](), models.SIZE, scheme)


def prepared(backend: Backend, network: str = "residual", bits: int = 8) -> Any:
    """A fresh copy of a prepared network; preparing takes a second."""
    return copy.deepcopy(_prepared(backend.name, network, bits))


def converted_by_toolkit(backend: Backend, model: Any) -> Any:
    """The user's own call."""
    if backend.name == "pt2e":
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        return convert_pt2e(copy.deepcopy(model))
    from torch.ao.quantization.quantize_fx import convert_fx

    return convert_fx(copy.deepcopy(model).eval())


def quiet(model: Any) -> Any:
    """In eval mode, where the toolkit has modes: the graphs of torch.export refuse to change theirs."""
    with contextlib.suppress(NotImplementedError):
        model.eval()
    return model


def logits(opened: Prepared, phase: Phase, batch: Tensor) -> Tensor:
    with torch.no_grad(), opened.phase(phase):
        return cast(Tensor, opened.module(batch))


def test_they_are_backends(backend: Backend) -> None:
    assert isinstance(backend, Backend)
    model = prepared(backend)
    assert backend.recognises(model)
    assert isinstance(backend.open(model), Prepared)
    others = [api.backends().get(name) for name in api.backends().names() if name != backend.name]
    assert not any(other.recognises(model) for other in others)
    assert not backend.recognises(models.trained())


def test_the_lowest_bits_are_those_of_all_that_is_quantized(backend: Backend) -> None:
    widths = ((8, 8, 8), (4, 8, 8), (8, 5, 8), (8, 8, 3))
    for weight, activation, boundary in widths:
        scheme = Scheme(weight_bits=weight, activation_bits=activation, boundary_bits=boundary)
        opened = backend.open(backend.prepare(models.trained(), models.SIZE, scheme))
        assert opened.lowest_bits == min(weight, activation, boundary)


@pytest.mark.parametrize("name", ["suffix", "integer_macs", "load"])
def test_what_lacks_a_part_is_refused_by_name(name: str) -> None:
    """Also what was added to the protocol since the other was written."""
    methods = [each for each in vars(Backend) if not each.startswith("_")]
    parts: dict[str, Any] = dict.fromkeys([*Backend.__annotations__, *methods], print)
    whole = type("Whole", (), parts)
    assert isinstance(choice._backend(whole), Backend)
    with pytest.raises(TypeError, match=rf"has not all of name, .*\b{name}\b"):
        choice._backend(type("Part", (), {each: value for each, value in parts.items() if each != name}))


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_convert_gives_what_was_calibrated(backend: Backend, network: str, bits: int) -> None:
    model, batch = prepared(backend, network, bits), models.images(256)
    opened = backend.open(model)
    assert opened.lowest_bits == bits
    models.observed(opened, batch)
    fake = logits(opened, Phase.EVALUATE, batch)
    with torch.no_grad():
        private = opened.convert()(batch)
    opened.commit()
    with torch.no_grad():
        committed, converted = quiet(model)(batch), converted_by_toolkit(backend, model)(batch)
    assert torch.equal(fake, committed)
    assert (
        private - converted
    ).abs().mean() <= 0.05 * fake.std()  # torch.ao's engines round ties differently
    assert (fake - converted).abs().mean() <= 0.05 * fake.std()
    assert (fake.argmax(1) == converted.argmax(1)).float().mean() >= 0.98
    exact = NETWORKS[network]()(batch)
    assert (fake - exact).abs().mean() <= {8: 0.1, 6: 0.2, 4: 0.5, 3: 1.0, 2: 2.0}[bits] * exact.std()


def test_no_weight_is_left_midway_between_two_levels(backend: Backend) -> None:
    model, batch = prepared(backend, bits=4), models.images(16)
    opened = backend.open(model)
    models.observed(opened, batch)
    pairs = zip(opened.weights(), opened.weight_units(), strict=True)
    weight, step = next((weight, step) for weight, step in pairs if weight.ndim == 4)
    with torch.no_grad():
        weight.copy_(((weight / step).floor().clamp(-7, 6) + 0.5) * step)
    fake = logits(opened, Phase.EVALUATE, batch)
    opened.commit()
    left = next(each for each in model.parameters() if each.shape == weight.shape and each.ndim == 4)
    level = left.detach() / step
    assert float((level - level.round()).abs().max()) < 1e-4
    with torch.no_grad():
        assert torch.equal(quiet(model)(batch), fake)


def test_all_multiply_adds_are_done_on_integers(backend: Backend, network: str) -> None:
    opened = backend.open(prepared(backend, network))
    models.observed(opened, models.images(8))
    done = backend.integer_macs(opened.convert(), torch.zeros(2, *models.SIZE))
    assert done == multiply_adds(NETWORKS[network](), models.SIZE) > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_the_backends_quantize_alike(network: str, bits: int) -> None:
    pytest.importorskip("torchao", reason="backend pt2e needs torchao")
    batch, exact, steps, errors = models.images(128), NETWORKS[network](), {}, {}
    for name in ("fx", "pt2e"):
        kit = api.backends().get(name)
        opened = kit.open(prepared(kit, network, bits))
        models.observed(opened, batch)
        pairs = zip(opened.weights(), opened.weight_units(), strict=True)
        steps[name] = [unit.flatten() for weight, unit in pairs if weight.ndim in (2, 4)]
        with torch.no_grad():
            errors[name] = (opened.convert()(batch) - exact(batch)).norm() / exact(batch).norm()
    torch.testing.assert_close(steps["fx"], steps["pt2e"], rtol=1e-5, atol=0)
    assert (
        0.8 < errors["fx"] / errors["pt2e"] < 3
    )  # fx rounds what layers return as well, the logits among it
    assert errors["fx"] < {8: 0.06, 4: 0.7}[bits]


def test_float_phases_are_the_network_itself(backend: Backend, network: str) -> None:
    original, batch = NETWORKS[network](), models.images(8)
    with torch.no_grad():
        exact = original(batch)
    opened = backend.open(prepared(backend, network, 3))
    for phase in (Phase.FLOAT, Phase.OBSERVE):
        torch.testing.assert_close(logits(opened, phase, batch), exact, rtol=1e-4, atol=1e-5)
    opened.set_ranges()
    assert not torch.allclose(logits(opened, Phase.EVALUATE, batch), exact, atol=1e-3)


def test_the_float_model_has_the_networks_layers(backend: Backend, network: str) -> None:
    original, batch = NETWORKS[network](), models.images(8)
    model = prepared(backend, network)
    before = models.state(model)
    floating = backend.open(model).float_model().eval()
    with torch.no_grad():
        torch.testing.assert_close(floating(batch), original(batch), rtol=1e-5, atol=1e-5)
    ours, theirs = (list(models.teacher(each).batch_norms.values()) for each in (floating, original))
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        assert our.eps == their.eps
        for name in ("running_mean", "running_var", "weight", "bias"):
            torch.testing.assert_close(getattr(our, name), getattr(their, name), rtol=1e-6, atol=1e-6)
    assert multiply_adds(floating, models.SIZE) == multiply_adds(original, models.SIZE)
    assert models.same(before, models.state(model))


def test_the_users_model_is_touched_by_commit_alone(backend: Backend, network: str) -> None:
    model, batch = prepared(backend, network, 4), models.images(16)
    before, code = models.state(model), model.code
    opened = backend.open(model)
    models.observed(opened, batch)
    for step in opened.steps():
        step.requires_grad_(True)
    with opened.phase(Phase.TRAIN):
        loss = opened.module(batch).square().mean()
    parameters = [*opened.weights(), *opened.steps()]
    torch.optim.SGD(parameters, lr=0.01).zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
    opened.convert()
    assert models.same(before, models.state(model))
    assert model.code == code
    opened.commit()
    assert not models.same(before, models.state(model))
    opened.convert()
    after = models.state(model)
    with torch.no_grad():
        for parameter in parameters:  # what was written is not the private copy
            parameter.zero_()
    assert models.same(after, models.state(model))


def test_everything_that_was_trained_is_committed(backend: Backend) -> None:
    """Parameters of the network itself as well, which no layer holds."""
    batch = models.images(32)
    torch.manual_seed(0)
    model = backend.prepare(models.Positioned().eval(), models.SIZE, Scheme())
    opened = backend.open(model)
    models.observed(opened, batch)
    own = [each for each in opened.weights() if each.shape == (8, 16, 16)]
    assert len(own) == 1
    with torch.no_grad():
        for parameter in opened.weights():
            parameter.mul_(0.5)
    fake = logits(opened, Phase.EVALUATE, batch)
    opened.commit()
    with torch.no_grad():
        assert torch.equal(quiet(model)(batch), fake)
        converted = converted_by_toolkit(backend, model)(batch)
    assert (fake - converted).abs().mean() <= 0.05 * fake.std()


def test_phases_restore_switches_also_after_an_exception(backend: Backend) -> None:
    opened = backend.open(prepared(backend, bits=4))
    before = models.state(opened.module)
    for outer in Phase:
        first, second = opened.phase(outer), opened.phase(Phase.FLOAT)
        with pytest.raises(KeyError), first, second:
            raise KeyError
        assert models.same(before, models.state(opened.module))


def test_everything_that_is_trained_gets_a_gradient(backend: Backend, network: str) -> None:
    opened, batch = backend.open(prepared(backend, network, 4)), models.images(16)
    assert opened.trainable
    models.observed(opened, batch)
    for step in opened.steps():
        step.requires_grad_(True)
    with opened.phase(Phase.TRAIN):
        opened.module(batch).square().mean().backward()
    weights, units = opened.weights(), opened.weight_units()
    assert all(step.grad is not None and bool(step.grad.isfinite().all()) for step in opened.steps())
    assert len(weights) == len(units) > 0
    for weight, unit in zip(weights, units, strict=True):
        assert weight.grad is not None
        assert torch.broadcast_shapes(weight.shape, unit.shape) == weight.shape
        assert bool((unit > 0).all())


def test_the_reference_is_what_the_activations_are_to_become(backend: Backend, network: str) -> None:
    opened, batch = backend.open(prepared(backend, network, 3)), models.images(8)
    reference = opened.reference()
    models.observed(opened, batch)
    with torch.no_grad(), reference.phase(Phase.FLOAT), opened.phase(Phase.TRAIN):
        before = reference.module(batch)
        for weight in opened.weights():
            weight.mul_(2)
        with reference.activations() as of_p, opened.activations() as of_q:
            assert torch.equal(reference.module(batch), before)
            z_q = opened.module(batch)
        assert list(of_p) == list(of_q)
        assert len(of_q) > 3
        assert any(torch.equal(each, z_q) for each in of_q.values())  # the logits are among them
        assert not any(each.shape == batch.shape for each in of_q.values())  # the input isn't
        assert not any(len(each) != len(batch) for each in of_q.values())  # nor are the weights
        opened.module(batch * 0)
        assert any(torch.equal(each, z_q) for each in of_q.values())  # the hooks are gone


@pytest.mark.parametrize("how", ["mse", "minmax"])
def test_ranges_cover_what_was_seen(backend: Backend, how: str) -> None:
    opened, batch = backend.open(prepared(backend)), models.images(64)
    models.observed(opened, batch, how)
    fake, exact = logits(opened, Phase.EVALUATE, batch), logits(opened, Phase.FLOAT, batch)
    assert (fake - exact).abs().mean() <= 0.02 * exact.std()


@pytest.mark.parametrize("bits", [4, 3])
def test_rounding_makes_up_for_its_errors(backend: Backend, network: str, bits: int) -> None:
    model = backend.prepare(NETWORKS[network](), models.SIZE, Scheme(weight_bits=bits))
    opened, batch, told = backend.open(model), models.images(128), []
    models.observed(opened, batch)
    exact, nearest = logits(opened, Phase.FLOAT, batch), logits(opened, Phase.EVALUATE, batch)
    reference, frozen = opened.reference(), opened.weights()[0]
    frozen.requires_grad_(False)
    before = frozen.clone()
    round_weights(opened, reference, batch, torch.Generator().manual_seed(0), lambda *at: told.append(at))
    rounded = logits(opened, Phase.EVALUATE, batch)
    assert (rounded - exact).square().mean() < 0.5 * (nearest - exact).square().mean()
    layers = told[0][1]
    assert layers >= 4
    assert told == [(done, layers) for done in range(1, layers + 1)]
    assert torch.equal(frozen, before)
    assert torch.equal(logits(reference, Phase.FLOAT, batch), exact)
    assert not any(module._forward_hooks for module in opened.module.modules())


class Twice(nn.Module):
    """A layer in groups that is called twice, and two that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.one, self.other, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, models.CLASSES)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x)).relu() * 2)
        return cast(Tensor, self.head(self.other(self.one(x).relu()).mean((2, 3))))


class Tied(nn.Module):
    """A convolution that is called twice, with a BatchNorm of each call's own and a ReLU behind the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, models.CLASSES)
        with torch.no_grad():
            self.two.weight.fill_(3)
            self.two.bias.fill_(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.one(self.conv(self.stem(x))))
        return cast(Tensor, self.head(self.two(self.conv(x)).mean((2, 3))))


def test_calls_of_a_layer_keep_what_follows_each(backend: Backend) -> None:
    torch.manual_seed(0)
    model, batch = Tied().eval(), models.images(64)
    opened = backend.open(backend.prepare(model, models.SIZE, Scheme()))
    with torch.no_grad():
        exact = model(batch)
    torch.testing.assert_close(logits(opened, Phase.FLOAT, batch), exact, rtol=1e-4, atol=1e-5)
    models.observed(opened, batch)
    assert (logits(opened, Phase.EVALUATE, batch) - exact).abs().mean() <= 0.05 * exact.std()
    assert any(note.startswith("1 repeated call of a layer has a copy") for note in opened.notes) == (
        backend.name == "fx"
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rounding_of_weights_that_are_used_twice(backend: Backend, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    opened = backend.open(backend.prepare(Twice().eval(), models.SIZE, Scheme(weight_bits=4)))
    opened.module.to(memory_format=layout)
    batch = models.images(128)
    models.observed(opened, batch)
    exact, nearest = logits(opened, Phase.FLOAT, batch), logits(opened, Phase.EVALUATE, batch)
    biases = [each for each in opened.weights() if each.ndim == 1]
    before = [each.clone() for each in biases]
    units = [
        unit for each, unit in zip(opened.weights(), opened.weight_units(), strict=True) if each.ndim == 1
    ]
    assert all(unit.shape == each.shape for unit, each in zip(units, biases, strict=True))
    round_weights(opened, opened.reference(), batch, torch.Generator().manual_seed(0), lambda *_: None)
    rounded = logits(opened, Phase.EVALUATE, batch)
    assert (rounded - exact).square().mean() < 0.5 * (nearest - exact).square().mean()
    assert not any(map(torch.equal, biases, before))


def test_rounding_leaves_alone_what_it_knows_nothing_of(backend: Backend) -> None:
    """One image that overflows, and a time that is over."""
    opened, batch = backend.open(prepared(backend, "residual", 4)), models.images(16)
    models.observed(opened, batch)
    before = models.state(opened.module)
    spoilt = batch.clone()
    spoilt[0, 0, 0, 0] = torch.nan
    arguments = (torch.Generator().manual_seed(0), lambda *_: None)
    round_weights(opened, opened.reference(), spoilt, *arguments)
    assert all(bool(each.isfinite().all()) for each in opened.module.parameters())
    opened.module.load_state_dict(cast(Any, before["tensors"]))
    assert round_weights(opened, opened.reference(), batch, *arguments, seconds=-1) == 4
    assert models.same(before, models.state(opened.module))


def output_means(opened: Prepared, batch: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The mean outputs of each layer over all its calls, in the order of their biases.

    Args:
        opened: whose layers are run.
        batch: images.
        inputs: what goes into each call; taken from the network where it is empty.
    """
    given: list[Tensor] = list(inputs)
    means: dict[Any, list[Tensor]] = {}

    def look(_layer: Layer, call: Call) -> Tensor:
        x, *rest = call.args
        if given:
            x = given.pop(0)
        else:
            inputs.append(x)
        output = call.function(x, *rest, **call.kwargs)
        means.setdefault(call.argument(2, "bias"), []).append(call.spread(output)[1])
        return call.result()

    with torch.no_grad(), opened.phase(Phase.EVALUATE), Layers(opened.module, look).at_work():
        opened.module(batch)
    return [torch.stack(each).mean(0) for each in means.values()]


@pytest.mark.parametrize(
    "make", [models.trained, models.inverted, Twice], ids=["residual", "inverted", "twice"]
)
def test_biases_take_up_what_flipping_weights_do_to_means(
    backend: Backend, make: Callable[[], nn.Module]
) -> None:
    """All weights lie just below the middle between two levels, then just above it."""
    torch.manual_seed(0)
    opened = backend.open(backend.prepare(make().eval(), models.SIZE, Scheme(weight_bits=4)))
    batch = models.images(128) + 1  # what has no mean moves none
    models.observed(opened, batch)
    inputs: list[Tensor] = []
    kernels = [
        (each, unit)
        for each, unit in zip(opened.weights(), opened.weight_units(), strict=True)
        if each.ndim > 1
    ]
    with torch.no_grad():
        for weight, unit in kernels:
            weight.copy_(((weight / unit).clamp(-6, 5).floor() + 0.499) * unit)
        before = output_means(opened, batch, inputs)
        with opened.phase(Phase.EVALUATE):
            means = SteadyMeans(opened, batch)
        for weight, unit in kernels:
            weight.add_(0.002 * unit)
        flipped = output_means(opened, batch, inputs)
        with opened.phase(Phase.EVALUATE):
            means.follow()
            steady = output_means(opened, batch, inputs)
            means.follow()
    after = output_means(opened, batch, inputs)
    assert len(before) >= 4
    assert all(map(torch.equal, after, steady))  # nothing has been changed since
    for old, moved, left in zip(before, flipped, steady, strict=True):
        shift = (moved - old).abs().mean()
        # of a level and 0.002 the means are to move by the latter
        assert (left - old).abs().mean() < 0.003 * shift


def test_steady_means_are_what_their_setting_switches(backend: Backend) -> None:
    """Of one and the same run; the ranges are set before."""
    states = []
    for steady in (True, False):
        model = prepared(backend, "residual", 4)
        adadfq_plugin.calibrate(model, **{**TOLD, "settings": {**QUICK, "steady_means": steady}})
        states.append(models.state(model)["tensors"])
    first, second = (cast(Mapping[str, Tensor], each) for each in states)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert any("bias" in name for name in changed), changed


def test_biases_without_a_say_stay(backend: Backend) -> None:
    """Frozen ones, and all of them where the inputs' means are no numbers."""
    opened, batch = backend.open(prepared(backend, "residual", 4)), models.images(16)
    models.observed(opened, batch)
    spoilt = batch.clone()
    spoilt[0, 0, 0, 0] = torch.nan
    biases = [each for each in opened.weights() if each.ndim == 1]
    biases[0].requires_grad_(False)
    before = [each.clone() for each in biases]
    for images, followed in ((spoilt, 0), (batch, len(biases) - 1)):
        with torch.no_grad(), opened.phase(Phase.EVALUATE):
            means = SteadyMeans(opened, images)
            for weight in opened.weights():
                weight.mul_(0.9)
            for bias, old in zip(biases, before, strict=True):
                bias.copy_(old)
            means.follow()
        moved = [not torch.equal(bias, old) for bias, old in zip(biases, before, strict=True)]
        assert sum(moved) == followed
        assert not moved[0]


def test_channels_with_gamma_zero_convert(backend: Backend) -> None:
    original = models.trained()
    with torch.no_grad():
        original.bn2.weight[:3] = 0
        original.bn3.weight.zero_()
    batch = models.images(32)
    expected = original(batch)
    model = backend.prepare(original, models.SIZE, Scheme())
    opened = backend.open(model)
    models.observed(opened, batch)
    opened.commit()
    converted = converted_by_toolkit(backend, model)(batch)
    assert torch.isfinite(converted).all()
    assert (converted - expected).abs().mean() < 0.1 * expected.std() + 0.02
    again = backend.open(backend.prepare(original, models.SIZE, Scheme())).float_model().eval()
    torch.testing.assert_close(again(batch), expected, rtol=1e-5, atol=1e-5)


def test_what_the_user_has_frozen_is_not_trained(backend: Backend) -> None:
    original = models.trained()
    original.linear.weight.requires_grad_(False)
    original.conv1.weight.requires_grad_(False)
    model = backend.prepare(original, models.SIZE, Scheme())
    free, some = (len(backend.open(each).weights()) for each in (prepared(backend), model))
    assert free - some == 3  # the bias that BatchNorm leaves behind follows its weight
    before = original.linear.weight.clone()
    adadfq_plugin.calibrate(model, **TOLD)
    after = [each for each in model.parameters() if each.shape == before.shape]
    limit = before.abs().amax() / 100  # weights may be clipped to their last level
    assert len(after) == 1
    assert (after[0] - before).abs().max() <= limit


def test_calibrate_is_in_place_repeatable_and_convertible(backend: Backend, network: str) -> None:
    first, second = prepared(backend, network, 4), prepared(backend, network, 4)
    result = adadfq_plugin.calibrate(first, **TOLD, seed=3)
    adadfq_plugin.calibrate(second, **TOLD, seed=3)
    assert models.same_tensors(models.state(first), models.state(second))
    assert result.prepared is first
    assert result.backend == backend.name
    batch = models.images(64)
    with torch.no_grad():
        fake, converted = quiet(first)(batch), converted_by_toolkit(backend, first)(batch)
    assert (fake.argmax(1) == converted.argmax(1)).float().mean() >= 0.98


def test_a_full_disk_is_an_error_that_python_knows(backend: Backend, tmp_path: Path) -> None:
    model = prepared(backend, bits=8)
    adadfq_plugin.calibrate(model, **TOLD)
    converted = converted_by_toolkit(backend, model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            backend.save(converted, torch.zeros(2, *models.SIZE), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("there", [False, True])
def test_a_gpu_calibrates_as_the_cpu_does(backend: Backend, network: str, there: bool) -> None:
    model, twin = prepared(backend, network, 4), prepared(backend, network, 4)
    if there:
        adadfq_plugin.calibrate(model.cuda(), **TOLD, seed=3)
    else:
        adadfq_plugin.calibrate(model, **TOLD, seed=3, device="cuda")
    adadfq_plugin.calibrate(twin, **TOLD, seed=3)
    places = {each.device.type for each in model.parameters()}
    assert places == {"cuda" if there else "cpu"}
    batch = models.images(64)
    with torch.no_grad():
        fake = quiet(model)(batch.cuda() if there else batch).cpu()
        converted, of_twin = converted_by_toolkit(backend, model.cpu())(batch), quiet(twin)(batch)
    assert (fake.argmax(1) == converted.argmax(1)).float().mean() >= 0.98
    assert (fake - of_twin).square().mean() < 0.2 * of_twin.var()  # draws are the same, sums are not


def test_a_failure_leaves_the_users_model_as_it_was(backend: Backend) -> None:
    model = prepared(backend, bits=4)
    before, code = models.state(model), model.code

    def interrupt(phase: str, step: int, _total: int, _figures: Mapping[str, float]) -> None:
        if phase == "game" and step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adadfq_plugin.calibrate(model, progress=interrupt, **TOLD)
    assert models.same(before, models.state(model))
    assert model.code == code
    adadfq_plugin.calibrate(model, **TOLD)


def test_batches_of_any_size(backend: Backend, network: str, tmp_path: Path) -> None:
    model = prepared(backend, network)
    opened = backend.open(model)
    models.observed(opened, models.images(16))
    opened.commit()
    converted = opened.convert()
    path = tmp_path / f"model{backend.suffix}"
    backend.save(converted, torch.zeros(1, *models.SIZE), path)
    loaded = backend.load(path)
    whole = models.images(7)
    with torch.no_grad():
        for run in (opened.float_model().eval(), quiet(model), converted, loaded):
            expected = run(whole)
            for size in (1, 2, 5):
                torch.testing.assert_close(run(whole[:size]), expected[:size], rtol=1e-5, atol=1e-5)
        assert torch.equal(loaded(whole), converted(whole))
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match="is no converted model"):
        backend.load(path)


RELOAD = {
    "fx": "import torch; run = torch.jit.load(sys.argv[1])",
    "pt2e": (
        "import torch.ao.quantization.fx._decomposed\n"  # registers the operators
        "run = torch.export.load(sys.argv[1]).module()"
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_saved_models_run_without_this_package(backend: Backend, tmp_path: Path) -> None:
    opened, batch = backend.open(prepared(backend)), models.images(5)
    models.observed(opened, batch)
    converted = opened.convert()
    backend.save(converted, batch[:1], tmp_path / f"model{backend.suffix}")
    torch.save(batch, tmp_path / "batch.pt")
    script = (
        f"import sys, torch, warnings\nwarnings.simplefilter('ignore')\n{RELOAD[backend.name]}\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad(): torch.save(run(torch.load(sys.argv[2])), sys.argv[3])\n"
        "assert not {'adadfq_plugin', 'torchao', 'timm'} & set(sys.modules), 'imported'\n"
    )
    files = [str(tmp_path / name) for name in (f"model{backend.suffix}", "batch.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, capture_output=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(files[2]), converted(batch), rtol=1e-6, atol=1e-6)


def test_refusals_name_the_culprit(backend: Backend) -> None:
    with pytest.raises(ModelError, match="Residual is not prepared"):
        backend.open(models.trained())
    opened = backend.open(prepared(backend))
    models.observed(opened, models.images(8))
    converted = opened.convert()
    assert backend.recognises(converted)
    with pytest.raises(ModelError, match="already converted"):
        adadfq_plugin.calibrate(converted, **TOLD)


def test_quantize_goes_the_whole_way(backend: Backend) -> None:
    model = models.inverted()
    before = models.state(model)
    result = adadfq_plugin.quantize(model, backend=backend.name, **TOLD)
    assert models.same(before, models.state(model))
    assert result.quantized is not None
    batch = models.images(32)
    labels = model(batch).argmax(1)
    for network in (result.prepared, result.quantized):
        assert adadfq_plugin.evaluate(network, [(batch, labels)]).top1 >= 0.9
