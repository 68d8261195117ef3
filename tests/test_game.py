"""Generators, priors, pool, pace and players, each by itself."""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, cast

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adadfq_plugin import fake_quantize
from adadfq_plugin.backends.fx import FXPrepared
from adadfq_plugin.config import AdaDFQSettings, GeneratorSettings, Settings
from adadfq_plugin.contracts import Phase, Task
from adadfq_plugin.errors import ModelError
from adadfq_plugin.facts import Facts, find_facts
from adadfq_plugin.functional import _checks
from adadfq_plugin.game import (
    GeneratorPlayer,
    Pace,
    ReplayPool,
    augment,
    layers,
    make_plan,
    mixed,
    pool,
    rounding,
)
from adadfq_plugin.game.best import BestState
from adadfq_plugin.game.optimizing import finite_step
from adadfq_plugin.game.quantized import QuantizedPlayer, in_pieces
from adadfq_plugin.game.run import Run
from adadfq_plugin.generators import Generator, coloured, natural_noise, whitened
from adadfq_plugin.teacher import Teacher, make_teacher, multiply_adds
from adadfq_plugin.transfers import Figures, fetched, sent

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    "size", [(3, 32, 32), (1, 28, 28), (3, 224, 224), (3, 33, 33), (3, 24, 40), (3, 7, 7)]
)
def test_generator_fits_any_size(size: tuple[int, int, int]) -> None:
    mean, std = (0.5,) * size[0], (0.25,) * size[0]
    facts = Facts(size, 7, mean, std)
    generator = Generator(facts, 8, 16)
    images = generator(torch.randn(3, 8), torch.tensor([0, 3, 6]))
    assert images.shape == (3, *size)
    pixels = facts.denormalize(images)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert 0.3 < images.std() < 1.5


def test_labels_change_the_image() -> None:
    generator = Generator(Facts((3, 16, 16), 4), 8, 16)
    z = torch.randn(2, 8)
    one, other = generator(z, torch.tensor([0, 1])), generator(z, torch.tensor([0, 2]))
    assert not torch.allclose(one[1], other[1])


def test_sampling_is_seeded_and_uniform() -> None:
    generator = Generator(Facts((3, 8, 8), 4), 8, 16)
    z, labels = generator.sample(4000, torch.Generator().manual_seed(1))
    again, _ = generator.sample(4000, torch.Generator().manual_seed(1))
    assert torch.equal(z, again)
    assert torch.bincount(labels, minlength=4).min() > 900
    assert abs(z.std().item() - 1) < 0.02


def test_natural_noise_has_the_spectrum_and_the_colours_of_photographs() -> None:
    facts = Facts((3, 64, 48), 7)
    noise = natural_noise(facts, 512, torch.Generator().manual_seed(0))
    assert noise.shape == (512, 3, 64, 48)
    assert 0.08 < noise.mean((2, 3)).var() < 0.4  # between images
    window = torch.hann_window(64)[:, None] * torch.hann_window(48)  # a piece of a scene has edges
    power = torch.fft.rfft2(noise * window).abs().square().mean((0, 1))
    for octave in (4, 8):  # amplitude 1 / f: the power falls by four from octave to octave
        assert power[octave, 0] / power[2 * octave, 0] == pytest.approx(4, rel=0.3)
    colours = torch.corrcoef(noise.movedim(1, 0).flatten(1))
    assert colours[0, 1] == pytest.approx(0.9, abs=0.03)
    again = natural_noise(facts, 512, torch.Generator().manual_seed(0))
    assert torch.equal(noise, again)


def test_images_lean_on_natural_noise_where_no_batch_norm_tells_their_statistics() -> None:
    def player(model: nn.Module, natural: float | None) -> GeneratorPlayer:
        settings = GeneratorSettings(latent_dim=8, generator_width=16, natural=natural)
        rng = torch.Generator().manual_seed(0)
        return GeneratorPlayer(models.teacher(model), settings, 64, rng, torch.device("cpu"))

    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert player(bare, None).natural == 0.95
    assert player(bare, 0.0).natural == player(models.trained(), None).natural == 0.0
    made = player(models.trained(), 0.6)
    images, _ = made.make()
    assert images.requires_grad
    rng = torch.Generator().manual_seed(0)
    own = made.generator(*made.generator.sample(64, rng))
    facts = made.teacher.facts
    blend = 0.6 * natural_noise(facts, 64, rng) + 0.8 * facts.to_standard(own)
    assert torch.allclose(images, made.generator.clip(facts.from_standard(blend)), atol=1e-6)


class _Told(nn.Module):
    """A network that is told pixels in other units, and brings them into its own."""

    def __init__(self, model: nn.Module, own: Facts, told: Facts) -> None:
        super().__init__()
        self.model, self.own, self.told = model, own, told

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.own.normalize(self.told.denormalize(x)))
        return logits


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.5), (0.0, 1 / 255)])
@pytest.mark.parametrize("natural", [0.0, 0.9])
def test_the_pixels_do_not_depend_on_the_units_that_a_network_is_told_them_in(
    mean: float, std: float, natural: float
) -> None:
    own = find_facts(models.trained(), input_size=models.SIZE)
    told = Facts(own.input_size, own.num_classes, (mean,) * 3, (std,) * 3)
    settings = GeneratorSettings(latent_dim=8, generator_width=16, natural=natural)
    made = []
    for model, facts in ((models.trained(), own), (_Told(models.trained(), own, told), told)):
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(0)
        player = GeneratorPlayer(make_teacher(model, facts), settings, 16, rng, torch.device("cpu"))
        with player.watching() as prior:
            for _ in Pace(3):
                player.warm_up(prior, Pace(3))
            images, labels = player.sample()
            each = [images, *(player.refine(prior, images, labels, Pace(3))[0] for _ in range(4))]
        made.append(torch.stack([facts.denormalize(kind) for kind in each]))
    assert (made[1] - made[0]).abs().mean() < 1e-3  # Adam turns rounding errors of small gradients into steps
    clipped = (made[1] < 1e-4) | (made[1] > 1 - 1e-4)
    assert clipped[0].float().mean() < 0.1


@given(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_pool_keeps_the_newest(capacity: int, batches: list[int]) -> None:
    pool = ReplayPool(capacity, torch.Generator().manual_seed(0))
    count = 0
    for size in batches:
        numbers = torch.arange(count, count + size)
        pool.add(numbers.float().view(-1, 1, 1, 1), numbers)
        count += size
    assert pool.labels.tolist() == list(range(max(0, count - capacity), count))
    assert pool.newest(3)[1].tolist() == pool.labels[-3:].tolist()
    images, labels = pool.draw(capacity)
    assert torch.equal(images.view(-1).long(), labels)


def test_views_are_parts_of_their_images() -> None:
    rng = torch.Generator().manual_seed(0)
    across = torch.linspace(0, 1, 20).expand(200, 1, 20, 20)
    views = augment(across, rng)
    assert views.shape == across.shape
    assert views.min() >= 0
    assert views.max() <= 1
    slopes = (views[..., -1] - views[..., 0])[:, 0, 0] / (1 - 1 / 20)
    shares = slopes.abs()
    assert 0.55 < shares.min() < 0.65  # the smallest view is 0.6 of the side
    assert shares.max() > 0.95
    assert 60 < (slopes < 0).sum() < 140  # half of them flipped
    again = augment(across, torch.Generator().manual_seed(0))
    assert torch.equal(again, views)


def test_white_noise_has_no_other_spectrum() -> None:
    white = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for change in (coloured, whitened):
        torch.testing.assert_close(change(white, 0.0), white)


def test_whitened_images_are_what_they_are_coloured_from() -> None:
    white = torch.randn(64, 3, 33, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = coloured(white)
    assert images.std().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(whitened(images), white)
    power = torch.fft.rfft2(images).abs().square().mean((0, 1)) / torch.fft.rfft2(white).abs().square().mean(
        (0, 1)
    )
    assert power[4, 0] / power[8, 0] == pytest.approx(4)
    assert power[0, 0] == pytest.approx(power[1, 0].item())


def test_mixtures_lie_between_two_images() -> None:
    rng = torch.Generator().manual_seed(0)
    batch = torch.eye(6).view(6, 6, 1, 1)
    result = mixed(batch, 1.0, rng).flatten(1)
    assert torch.allclose(result.sum(1), torch.ones(6))
    assert ((result > 0).sum(1) <= 2).all()
    assert not torch.equal(result, batch.flatten(1))
    assert (result.diagonal() > 0).all()
    assert torch.equal(mixed(batch, 0.0, rng), batch)
    changed = sum(mixed(batch, 0.5, rng) is not batch for _ in range(200))
    assert 70 < changed < 130


def plan(settings: Settings, macs: int, side: int, bits: int) -> tuple[int, int, int]:
    teacher = Teacher(nn.Identity(), Facts((3, side, side), 10), macs=macs)
    made = make_plan(settings, teacher, bits)
    return made.warmup, made.steps, made.batch_size


def test_plan_follows_bits_and_cost() -> None:
    cheap = [plan(AdaDFQSettings(), 10**6, 32, bits) for bits in (8, 4, 2)]
    assert cheap[0][1] < cheap[1][1] < cheap[2][1]
    dear = plan(AdaDFQSettings(), 4 * 10**9, 224, 4)
    assert dear[1] < cheap[1][1]
    assert dear[0] < cheap[1][0]
    assert dear[2] < cheap[1][2]
    assert plan(Settings(steps=7, batch_size=5), 10**6, 32, 4) == (0, 7, 5)
    assert plan(GeneratorSettings(warmup_steps=3), 10**6, 32, 4)[0] == 3


def test_a_time_limit_leaves_images_out_before_it_leaves_them_raw() -> None:
    teacher = Teacher(nn.BatchNorm2d(3), Facts((3, 8, 8), 3))
    settings = GeneratorSettings(generator_batch_size=64)
    limited = make_plan(settings, teacher, 4, 10)
    seconds = 600 * 0.35  # for 1024 images and those that judge: 19 batches
    for step, samples in ((seconds / 19 / 60, 1024), (seconds / 10 / 30, 10 * 56), (10.0, 256), (0.0, 1024)):
        fitted = limited.fitting(step * 0.999)
        assert fitted.samples == samples
        assert fitted.pace("samples").seconds == pytest.approx(seconds / math.ceil(samples / 56))
    assert make_plan(settings, teacher, 4).fitting(10.0).samples == 1024
    large = make_plan(settings, Teacher(nn.BatchNorm2d(3), Facts((3, 224, 224), 3)), 4, 10)
    assert large.fitting(10.0).samples == large.samples == 128
    for told in ({"samples": 512}, {"refine_steps": 3}):
        made = make_plan(settings.model_copy(update=told), teacher, 4, 10)
        assert made.fitting(10.0) == made


def test_pace_counts_or_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    limited_teacher = Teacher(nn.Identity(), Facts((3, 8, 8), 3))
    limited = make_plan(GeneratorSettings(samples=128, batch_size=32), limited_teacher, 4, 10)
    assert limited.pace("samples").seconds == pytest.approx(600 * 0.35 / 5)  # four batches and one kept out
    assert limited.pace("game").most == 3 * make_plan(Settings(), limited_teacher, 4).steps
    default = make_plan(GeneratorSettings(), limited_teacher, 4)  # of a network without BatchNorm
    assert limited.pace("warmup").most == 3 * default.warmup
    assert limited.pace("samples").most == 3 * default.refine
    told = make_plan(
        GeneratorSettings(samples=128, batch_size=32, warmup_steps=7, refine_steps=0),
        Teacher(nn.Identity(), Facts((3, 8, 8), 3)),
        4,
        10,
    )
    assert (told.pace("warmup").total, told.pace("warmup").seconds) == (7, None)  # what was told is kept
    assert told.pace("samples").total == 0
    assert told.pace("game").seconds == pytest.approx(600 * 0.95)  # and the time goes to what runs
    settings = GeneratorSettings(samples=128, batch_size=32)
    observed = make_plan(settings, limited_teacher, 8, 10, trains=False)
    rounded = make_plan(settings.model_copy(update={"steps": 0}), limited_teacher, 8, 10)
    for made, share in ((observed, 0.95), (rounded, 0.85)):
        warmup, batch = made.pace("warmup").seconds, made.pace("samples").seconds
        assert warmup is not None
        assert batch is not None
        assert warmup + 5 * batch == pytest.approx(600 * share)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace(10**6, seconds=10)
    for _ in pace:
        now[0] += 0.5
    assert pace.total == pace.step == 20
    assert not pace.enough
    pace = Pace(10**6, seconds=10, most=12)  # the clock has time for 20
    for _ in pace:
        now[0] += 0.5
    assert pace.total == pace.step == 12
    assert pace.enough
    assert list(Pace(3)) == [1, 2, 3]
    assert list(Pace(0)) == []


def test_warm_up_lowers_the_loss_and_p_gets_no_gradients() -> None:
    teacher = make_teacher(models.trained(), Facts(models.SIZE, models.CLASSES))
    settings = AdaDFQSettings(latent_dim=8, generator_width=16, generator_learning_rate=1e-2)
    player = GeneratorPlayer(teacher, settings, 16, torch.Generator().manual_seed(0), torch.device("cpu"))
    pace = Pace(30)
    with player.watching() as prior:
        rows = [player.warm_up(prior, pace) for _ in pace]
    assert sum(rows[-1].values()) < 0.7 * sum(rows[0].values())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_refined_images_are_better_and_still_images() -> None:
    facts = Facts(models.SIZE, models.CLASSES)
    teacher = make_teacher(models.trained(), facts)
    settings = AdaDFQSettings(latent_dim=8, generator_width=16)
    player = GeneratorPlayer(teacher, settings, 16, torch.Generator().manual_seed(0), torch.device("cpu"))
    images, labels = player.sample()
    before = images.clone()

    def loss(batch: torch.Tensor) -> float:
        with torch.no_grad(), player.watching() as prior:
            return nn.functional.cross_entropy(teacher(batch), labels).item() + prior().item()

    with player.watching() as prior:
        in_spectrum, in_pixels = (player.refine(prior, images, labels, Pace(60)) for _ in range(2))
        same = [player.refine(prior, images, labels, Pace(0))[0] for _ in range(2)]
    for refined, figures in (in_spectrum, in_pixels):
        assert loss(refined) < 0.9 * loss(images)
        assert set(figures) == {"prior", "cross_entropy"}
        pixels = facts.denormalize(refined)
        assert pixels.min() >= -1e-6
        assert pixels.max() <= 1 + 1e-6
        assert not refined.requires_grad
    assert (in_pixels[0] - in_spectrum[0]).abs().mean() > 0.05
    assert torch.equal(images, before)
    assert all(torch.equal(each, images) for each in same)
    assert all(parameter.grad is None for parameter in (*teacher.model.parameters(), *player.parameters))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_updates_that_are_not_finite_are_left_out(optimizer: Any) -> None:
    batch = models.images(8)

    def player() -> QuantizedPlayer:
        opened = FXPrepared(models.prepared())
        models.observed(opened, batch)
        return QuantizedPlayer(
            opened, models.teacher(), Settings(optimizer=optimizer, learning_rate=0.01), Pace(2)
        )

    learner, spared = player(), player()
    with learner.learning():
        z_q = learner.prepared.module(batch)
        good = torch.autograd.grad(
            learner.loss(z_q.detach() + torch.randn_like(z_q), z_q), learner.parameters
        )
    before = [parameter.detach().clone() for parameter in learner.parameters]
    learner.update([good[0] * torch.nan, *good[1:]])
    assert learner.skipped == 1
    assert all(map(torch.equal, before, learner.parameters))
    for each in (learner, spared):
        each.update(good)
        each.update(good)
    assert learner.skipped == 1
    assert not all(map(torch.equal, before, learner.parameters))
    assert all(map(torch.equal, spared.parameters, learner.parameters))  # their moments know nothing of it


ON_THE_CPU = {fake_quantize.__file__, _checks.__file__, pool.__file__}
"""What asks switches, labels and step sizes where they are on the CPU, and random numbers, which always are."""


def test_gradients_of_another_layout_are_added_to_their_own_elements() -> None:
    start, gradient = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
        for scale in (1.0, 3.0):
            each = (scale * gradient).contiguous(memory_format=layout)
            assert finite_step(optimizer, [parameter], [each]) == 0
        found.append(parameter.detach())
    assert torch.equal(*found)


class _Questions(TorchDispatchMode):
    """Notes where a tensor is made a number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            callers = traceback.extract_stack()
            if not {each.filename for each in callers} & ON_THE_CPU:
                self.asked.append("".join(traceback.format_list(callers)))
        return func(*args, **(kwargs or {}))


@contextmanager
def _nothing_asked(device: torch.device) -> Iterator[None]:
    """Fails where the block waits for the device."""
    with _Questions() as questions, ExitStack() as afterwards:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            afterwards.callback(torch.cuda.set_sync_debug_mode, "default")
        yield
    assert not questions.asked


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_steps_ask_the_device_nothing(where: str) -> None:
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, rng = torch.device(where), torch.Generator().manual_seed(0)
    opened = FXPrepared(models.prepared(4))
    teacher = make_teacher(models.trained(), Facts(models.SIZE, models.CLASSES), device=device)
    opened.module.to(device)
    models.observed(opened, models.images(32).to(device))
    settings = AdaDFQSettings(latent_dim=8, generator_width=16, natural=0.5)
    learner = QuantizedPlayer(opened, teacher, settings, Pace(4))
    player = GeneratorPlayer(teacher, settings, 8, rng, device)
    kept = ReplayPool(64, rng)
    figures: list[Figures] = []

    def step(prior: Callable[[], Tensor]) -> None:
        figures.append(player.warm_up(prior, Pace(4)))
        images, labels = player.make()
        gradients, played = player.play(
            prior, teacher(images), opened.module(images), labels, keep_graph=False
        )
        player.update(gradients)
        refined, more = player.refine(prior, images, labels, Pace(2))
        kept.add(refined, labels)
        drawn, _ = kept.draw(4)
        loss = learner.learn(mixed(augment(drawn, rng), 1.0, rng))
        figures.extend([played, more, {"loss": loss}])

    with learner.learning(), player.watching() as prior:
        step(prior)  # the first of each kind may look around
        with _nothing_asked(device):
            step(prior)
            waiting = [fetched(each) for each in figures]
    assert all(np.isfinite(value) for each in waiting for value in each().values())
    assert learner.skipped == player.skipped == 0


def test_figures_come_in_the_order_of_their_names_and_of_any_kind() -> None:
    told: Figures = {
        "loss": torch.tensor([0.5]),
        "held_out": 2,
        "prior": torch.tensor(3.0, dtype=torch.float64),
    }
    assert list(fetched(told)().items()) == [("loss", 0.5), ("held_out", 2.0), ("prior", 3.0)]
    assert fetched({})() == {}


def test_what_is_sent_is_of_the_type_and_at_the_place_of_what_it_goes_with() -> None:
    here = torch.ones(2)
    assert sent(here, torch.device("cpu")) is here
    assert sent(here, torch.zeros((), dtype=torch.float64)).dtype is torch.float64
    assert sent(here, torch.zeros((), device="meta")).device.type == "meta"


def test_gradients_that_are_not_finite_leave_the_generator_alone() -> None:
    settings = AdaDFQSettings(latent_dim=8, generator_width=16)
    rng = torch.Generator().manual_seed(0)
    player = GeneratorPlayer(models.teacher(), settings, 8, rng, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in player.parameters]
    good = [torch.ones_like(parameter) for parameter in player.parameters]
    player.update([*good[:-1], good[-1] * torch.inf])
    assert player.skipped == 1
    assert all(map(torch.equal, before, player.parameters))
    player.update(good)
    assert player.skipped == 1
    assert not any(map(torch.equal, before, player.parameters))


def test_a_batch_of_the_game_takes_no_more_steps_than_time_left_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paces: dict[str, list[int]] = {"samples": [], "game": []}
    original, phase = GeneratorPlayer.refine, "samples"

    def refine(self: GeneratorPlayer, prior: Any, images: Tensor, labels: Tensor, pace: Pace) -> Any:
        made = original(self, prior, images, labels, pace)
        paces[phase].append(pace.step)
        return made

    monkeypatch.setattr(GeneratorPlayer, "refine", refine)
    prepared = FXPrepared(models.prepared(4))
    settings = AdaDFQSettings(
        samples=32, batch_size=8, latent_dim=8, generator_width=16, warmup_steps=1, range_samples=8
    )
    run = Run(Task(models.teacher(), prepared, settings, 0, torch.device("cpu"), lambda *_: None, 0.02))
    player = run.player()
    run.make_samples(player)
    run.observe()
    phase = "game"
    run.play(player)
    assert max(paces["samples"]) < run.plan.refine
    assert paces["game"] == [min(paces["samples"])] * len(paces["game"])
    assert paces["game"]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_gpu_is_waited_for_once_it_has_the_next_step_to_do(where: str) -> None:
    heard: list[tuple[int, float]] = []

    def progress(_phase: str, step: int, _total: int, figures: Mapping[str, float]) -> None:
        heard.append((step, figures["loss"]))

    settings = AdaDFQSettings(samples=8)
    prepared = FXPrepared(models.prepared(4))
    run = Run(Task(models.teacher(), prepared, settings, 0, torch.device(where), progress, None))
    with run._timed("game"):
        run._report("game", 1, 2, {"loss": torch.tensor(0.5)})
        assert heard == ([] if where == "cuda" else [(1, 0.5)])
        run._report("game", 2, 2, {"loss": torch.tensor(0.25)})
        assert len(heard) == (1 if where == "cuda" else 2)
    assert heard == [(1, 0.5), (2, 0.25)]
    assert run.history.column("game", "loss") == ([1, 2], [0.5, 0.25])


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12])
def test_images_of_both_kinds_are_kept_from_training(size: int) -> None:
    settings = AdaDFQSettings(samples=64, batch_size=8, latent_dim=8, generator_width=16)
    prepared = FXPrepared(models.prepared(4))
    run = Run(Task(models.teacher(), prepared, settings, 0, torch.device("cpu"), lambda *_: None, None))
    batches = itertools.count()

    def draw() -> tuple[Tensor, Tensor, dict[str, float]]:
        kind = float(next(batches) % 2)  # batches are refined in two ways by turns
        return torch.full((size, 3, 8, 8), kind), torch.zeros(size, dtype=torch.int64), {}

    run.fill(draw)
    kinds = run.held_out[:, 0, 0, 0].tolist()
    assert len(kinds) in (9, 10)
    assert 4 <= sum(kinds) <= 5


def test_the_best_state_comes_back() -> None:
    opened = FXPrepared(models.prepared())
    batch = models.images(8)
    models.observed(opened, batch)
    parameters = list(opened.weights())
    good = [parameter.detach().clone() for parameter in parameters]
    with opened.phase(Phase.TRAIN):
        best = BestState(opened, models.teacher(), batch, parameters, 4.0)
        first = best.look(0)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(3)
        assert best.look(1) > first
        with torch.no_grad():
            parameters[0].fill_(torch.nan)
        best.look(2)
        assert best.restore()
        assert (best.step, best.divergence, best.looked) == (0, first, 2)
        assert all(map(torch.equal, parameters, good))
        assert best.look(3) == first
        assert not best.restore()  # as good as the best
        with torch.no_grad():
            parameters[0].fill_(torch.nan)
        worse = BestState(opened, models.teacher(), batch, parameters, 4.0)
        worse.look(0)
        with torch.no_grad():
            parameters[0].copy_(good[0])
        assert worse.look(1) == first
        assert not worse.restore()
        assert (worse.step, worse.divergence) == (1, first)
        for latest, back in ((1e-6, False), (1e-2, True)):  # against a network that is P all but for rounding
            best.divergence, best.latest = 1e-7, latest
            assert best.restore() is back
    assert sum(best.due(step, 1000) for step in range(1, 1001)) == 8
    assert best.due(1000, 1000)
    assert [best.due(step, 3) for step in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize("own", [True, False])
def test_activations_are_part_of_the_loss(own: bool) -> None:
    opened = FXPrepared(models.prepared(3))
    teacher = models.teacher() if own else models.teacher(models.trained(seed=5))
    batch = models.images(8)
    models.observed(opened, batch)
    settings = Settings(feature_weight=3.0, learn_step_sizes=False)
    learner, plain = (
        QuantizedPlayer(opened, teacher, each, Pace(2))
        for each in (settings, settings.model_copy(update={"feature_weight": 0.0}))
    )
    reference = opened.reference()
    with learner.learning():
        z_p, z_q = learner.answers(batch), opened.module(batch)
        assert torch.allclose(z_p, teacher(batch), atol=1e-4)
        loss = learner.loss(z_p, z_q)
        with torch.no_grad(), reference.phase(Phase.FLOAT), reference.activations() as of_p:
            reference.module(batch)
            with opened.activations() as of_q:
                opened.module(batch)
        expected = sum(
            float((of_p[name] - of_q[name]).square().mean() / of_p[name].var(correction=0)) for name in of_p
        )
        assert abs((loss - plain.loss(z_p, z_q)).item() - 3 * expected / len(of_p)) < 1e-4 * expected
        for _ in range(20):
            again = learner.learn(batch)
    assert again < 0.99 * loss


def test_a_batch_in_pieces_teaches_the_same() -> None:
    def taught(size: int | None) -> tuple[Tensor, list[torch.Tensor]]:
        opened = FXPrepared(models.prepared(4))
        with torch.no_grad(), opened.phase(Phase.OBSERVE):
            opened.module(batch)
        opened.set_ranges("mse")
        settings = Settings(optimizer="sgd", learning_rate=0.1, feature_weight=0.0)
        pace = Pace(1)
        learner = QuantizedPlayer(opened, models.teacher(), settings, pace)
        with learner.learning():
            (loss,) = [learner.learn(batch, size) for _ in pace]
        return loss, list(opened.weights())

    batch = models.images(7)
    (whole, expected), (pieces, found) = taught(None), taught(3)
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-4)
    for a, b, start in zip(expected, found, FXPrepared(models.prepared(4)).weights(), strict=True):
        assert not torch.equal(a, start)
        assert torch.allclose(a - start, b - start, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("size", [None, 3])
def test_what_a_batch_says_nothing_of_is_left_alone(size: int | None) -> None:
    opened, batch = FXPrepared(models.prepared(8)), models.images(7)
    models.observed(opened, batch)
    settings = Settings(optimizer="sgd", learning_rate=0.1, weight_decay=0.5, feature_weight=0.0)
    pace = Pace(1)
    learner = QuantizedPlayer(opened, models.teacher(), settings, pace)
    unused, used = nn.Parameter(torch.ones(3)), opened.weights()[0].detach().clone()
    learner.parameters.append(unused)
    learner.optimizer.param_groups[0]["params"].append(unused)
    with learner.learning():
        for _ in pace:
            learner.learn(batch, size)
    assert torch.equal(unused, torch.ones(3))  # no gradient is no step, and no decay either
    assert not torch.equal(opened.weights()[0], used)


def test_facts_by_trial() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.linear = nn.Linear(4 * 14 * 14, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, self.linear(self.conv(x).flatten(1)))

    facts = find_facts(Fixed())
    assert facts.input_size == (1, 28, 28)
    assert facts.sources["input_size"].startswith("guess")
    assert facts.mean == (0.5,)
    with pytest.raises(ModelError, match="no square image"):
        find_facts(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(5, 2)))

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with pytest.raises(ModelError, match="returns tuple"):
        find_facts(Pair(), input_size=8)
    with pytest.raises(ModelError, match="logits"):
        find_facts(nn.Conv2d(3, 4, 1), input_size=8)

    class Scalar(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    with pytest.raises(ModelError, match=r"no square image of side .* runs through the model .*shape \(\)"):
        find_facts(Scalar())


def test_a_bare_side_takes_the_channels_that_the_network_takes() -> None:
    stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stem.pretrained_cfg = {"input_size": (3, 224, 224)}  # type: ignore[assignment]
    sizes = [find_facts(stem.eval(), input_size=each).input_size for each in (16, (16, 24), np.int64(16))]
    assert sizes == [(3, 16, 16), (3, 16, 24), (3, 16, 16)]
    with pytest.raises(ModelError, match="input_size '224' is not a side"):
        find_facts(stem, input_size="224")


def test_a_teacher_may_have_scripted_modules() -> None:
    """What is copied of one with gradients on has a history, and can't be frozen."""
    scripted: nn.Module = torch.jit.script(nn.Conv2d(3, 4, 1))
    model = nn.Sequential(scripted, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    teacher = make_teacher(model, Facts((3, 8, 8), 4))
    assert not any(each.requires_grad for each in teacher.model.parameters())
    assert all(each.requires_grad for each in model.parameters())
    assert torch.equal(teacher(noise := teacher.noise(2)), model(noise))


def test_multiply_adds_of_groups_and_linear() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(8 * 25, 10))
    assert multiply_adds(model, (4, 5, 5)) == 8 * 25 * 2 * 9 + 200 * 10


def test_layout_that_fails_in_pytorch_is_avoided() -> None:
    def layout(conv: nn.Module, side: int, *, volume: bool = False) -> bool:
        net = nn.Sequential(conv, nn.BatchNorm2d(20), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if volume:
            net.register_parameter("bias_table", nn.Parameter(torch.zeros(1, 1, 1, 1, 1)))
        return make_teacher(net, Facts((3, side, side), 20)).channels_last

    assert layout(nn.Conv2d(3, 20, 3, stride=2), 96)
    assert layout(nn.Conv2d(3, 20, 1), 96)
    assert not layout(nn.Conv2d(3, 20, 1, stride=2), 96)
    assert not layout(nn.Conv2d(3, 20, 3, stride=2), 96, volume=True)
    assert not layout(nn.Conv2d(3, 20, 3, stride=2), 32)


def test_pieces_give_the_gradients_of_the_whole() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(7, 3, 8, 8, requires_grad=True)
    whole = network(images)
    pieces = in_pieces(network, images, 3)
    torch.testing.assert_close(pieces, whole)
    wanted = [images, *network.parameters()]
    expected = torch.autograd.grad(whole.square().sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(pieces.square().sum(), wanted), expected)


ATEN: Any = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "shape", "kernel", "rest"),
    [
        (F.linear, (4, 6), (5, 6), ()),
        (ATEN.linear.default, (4, 3, 6), (5, 6), ()),
        (F.conv2d, (3, 6, 9, 7), (4, 3, 3, 2), (None, 2, (1, 0), 1, 2)),
        (F.conv2d, (3, 6, 9, 7), (6, 1, 3, 3), (None, 1, "same", (2, 1), 6)),
        (F.conv2d, (3, 6, 9, 7), (6, 6, 3, 3), (None, 1, "valid")),
        (ATEN.conv2d.default, (3, 6, 9, 7), (4, 6, 1, 1), (None, [2, 1])),
        (F.conv1d, (3, 6, 9), (4, 3, 3), (None, 2, 1, 1, 2)),
        (ATEN.conv1d.default, (3, 6, 9), (4, 6, 3), (None, [1], [2], [2])),
    ],
)
def test_a_layers_inputs_are_what_its_outputs_are_products_of(
    function: Any, shape: tuple[int, ...], kernel: tuple[int, ...], rest: tuple[Any, ...]
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(kernel)
    output = function(x, weight, *rest)
    call = layers.Call(function, function.__name__.partition(".")[0], (x, weight, *rest), {})
    rows = torch.cat(list(call.inputs(torch.Generator().manual_seed(0))), 1)
    found = rows @ weight.reshape(call.groups, kernel[0] // call.groups, -1).mT  # (groups, places, outputs)
    torch.testing.assert_close(found.mean(1).flatten(), call.spread(output)[1])
    torch.testing.assert_close(found.square().mean(1).flatten(), call.spread(output.square())[1])
    torch.testing.assert_close(call.result(2 * weight), 2 * output)


def test_a_bias_follows_a_shift_of_the_inputs_no_farther_than_it_is_believed() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(64, 6), torch.randn(3, 6), nn.Parameter(torch.zeros(3))
    call = layers.Call(F.linear, "linear", (x, weight, bias), {})
    quantized = weight + torch.tensor([0.5, 0.0, 0.0]).unsqueeze(1)
    layer: Any = SimpleNamespace(weight=weight, quantizer=lambda _: quantized)
    deviation, mean = call.spread(call.result())
    away = torch.tensor([0.0, 5.0, 0.05]) * deviation
    with torch.no_grad():
        rounding._correct(bias, layer, call, mean + away, weight)
    own = -0.5 * x.sum(1).mean()  # what rounding did is taken back whole
    expected = torch.stack([own, 0.1 * deviation[1], 0.05 * deviation[2]])
    torch.testing.assert_close(bias.detach(), expected)


def test_a_network_of_one_channel_takes_the_mean_of_timms_channels() -> None:
    grey = models.Residual()
    grey.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    grey.pretrained_cfg = {"input_size": (3, 20, 24), "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}  # type: ignore[assignment]
    facts = find_facts(grey.eval())
    assert facts.input_size == (1, 20, 24)
    assert facts.mean == pytest.approx((0.5,))
    assert facts.std == pytest.approx((0.2,))
    assert set(facts.guesses) == {"mean", "std"}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"mean": (123.7, 116.3, 103.5)}, "divide by 255"),
        ({"std": 0.5}, "one number a channel"),
        ({"std": (0.5,)}, "1 values for 3"),
    ],
)
def test_means_and_deviations_in_other_units_are_refused(told: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        find_facts(models.trained(), input_size=models.SIZE, **told)


def test_a_network_of_doubles_is_told_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"float64; call \.float\(\)"):
        find_facts(models.trained().double(), input_size=models.SIZE)


def test_multiply_adds_of_attention() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            attended: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return attended

    before = torch.backends.mha.get_fastpath_enabled()
    network = Attends().eval().requires_grad_(False)
    assert multiply_adds(network, (8, 4, 4)) == 16 * 8 * 8 * 4 + 2 * 16 * 16 * 8
    assert torch.backends.mha.get_fastpath_enabled() == before
