"""One run, phase by phase: warm up, fill the pool, set the ranges, play."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from adadfq_plugin.config import AdaDFQSettings, GeneratorSettings
from adadfq_plugin.contracts import Outcome, Phase, Prepared, Task
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import SettingsError
from adadfq_plugin.game.best import BestState
from adadfq_plugin.game.biases import SteadyMeans
from adadfq_plugin.game.generator import GeneratorPlayer
from adadfq_plugin.game.pace import KEPT_OUT, ROUNDING, Pace, make_plan
from adadfq_plugin.game.pool import ReplayPool, augment, mixed
from adadfq_plugin.game.quantized import QuantizedPlayer, feature_weight, in_pieces
from adadfq_plugin.game.rounding import round_weights
from adadfq_plugin.history import History
from adadfq_plugin.hooks import fork_rng
from adadfq_plugin.transfers import Figures, fetched, sent

__all__ = ["Run"]

ROUNDED = 64
"""Large images that the weights are rounded by: all of them go through the network at once."""
MEANS = 32
"""Images that tell the means of the layers' inputs."""
ROUNDS = 0.7
"""Share of a cosine's steps after which no batch joins the pool: 4 % of what its rates add up to are left then."""
PIECE = 4
"""Large images of which Q's graph is kept at a time, half of them beside P's: faster than more or fewer at a time."""


class Run:
    """The phases that methods are made of; figures and times are kept along the way.

    Args:
        task: what the method was given.
        views: whether ranges and Q see views of the samples, or the samples as they are.
    """

    def __init__(self, task: Task, *, views: bool = True) -> None:
        self.task, self.views = task, views
        prepared = task.prepared
        self._learns = prepared.trainable and bool(prepared.weights() or task.settings.learn_step_sizes)
        self.plan = make_plan(
            task.settings, task.teacher, prepared.lowest_bits, task.minutes, trains=self._learns
        )
        self.rng = torch.Generator().manual_seed(task.seed)
        self.pool = ReplayPool(2 * self.plan.samples, self.rng)
        self.held_out = torch.empty(0)
        """Images that Q does not learn from: what its states are judged by."""
        self._refine = self.plan.refine
        """Steps on each batch of the game: no more than a time limit left for the others."""
        self._reference: Prepared | None = None
        """Q with P's weights, where its activations count."""
        self.history = History()
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self._told: Callable[[], None] | None = None
        """The report that a GPU may still be at work for."""
        self._done: list[str] = []
        """How much of each phase there was, for the notes."""

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._tell_last()
        self.seconds[phase] = time.monotonic() - start

    def _report(self, phase: str, step: int, total: int, figures: Figures) -> None:
        """Tells a step's figures; where a GPU has to be waited for, once it has the next step to do."""
        wait = fetched(figures)

        def tell() -> None:
            numbers = wait()
            if numbers:
                self.history.record(phase, step, numbers)
            self.task.progress(phase, step, total, numbers)

        self._tell_last()
        self._told = tell
        if self.task.device.type != "cuda":
            self._tell_last()

    def _tell_last(self) -> None:
        if self._told is not None:
            tell, self._told = self._told, None
            tell()

    def player(self) -> GeneratorPlayer:
        """A fresh generator for the task's teacher.

        Raises:
            SettingsError: settings of no generator.
        """
        task, settings = self.task, self.task.settings
        if not isinstance(settings, GeneratorSettings):
            raise SettingsError(f"a generator needs GeneratorSettings, not {type(settings).__name__}")
        with fork_rng(task.seed, task.device):  # modules draw their weights from the global generators
            player = GeneratorPlayer(
                task.teacher, settings, self.plan.generator_batch_size, self.rng, task.device
            )
        self.notes += player.notes
        return player

    def warm_up(self, player: GeneratorPlayer) -> None:
        """G alone, until its samples carry P's statistics."""
        pace = self.plan.pace("warmup")
        with self._timed("warmup"), player.watching() as prior:
            for step in pace:
                self._report("warmup", step, pace.total, player.warm_up(prior, pace))
        self._done.append(f"{pace.step} steps of G on {self.plan.generator_batch_size} images each")
        self._tell(pace, "the generator's warm-up")
        if pace.step:
            self.plan = self.plan.fitting(self.seconds["warmup"] / pace.step)

    def make_samples(self, player: GeneratorPlayer) -> None:
        """Fills the pool with images that G made and that were then refined."""

        def draw() -> tuple[Tensor, Tensor, Figures]:
            pace = self.plan.pace("samples")
            made = player.kept(prior, pace)
            lengths.append(pace.step)
            return made

        lengths: list[int] = []
        with player.watching() as prior:
            self.fill(draw)
        fewest, most = min(lengths), max(lengths)
        self._refine = min(self._refine, fewest)
        steps = f"{fewest} to {most}" if fewest < most else f"{most}"
        self._done.append(f"{steps} on each of its {self.plan.samples} images themselves")

    def fill(self, draw: Callable[[], tuple[Tensor, Tensor, Figures]]) -> None:
        """Draws batches of images, labels and figures until the pool is full; some of each judge Q's states instead."""
        judged = (self._trains or self._rounds) and self.task.settings.keep_best
        apart: list[Tensor] = []
        drawn = 0
        with self._timed("samples"):
            while len(self.pool) < self.plan.samples:
                images, labels, figures = draw()
                drawn += len(images)
                number = torch.arange(drawn - len(images), drawn)
                # images of small batches, which are refined in two ways by turns, are to be of both
                turn = number // KEPT_OUT % 2 * len(images)
                learned = ((number + 1 + turn) % KEPT_OUT > 0) | (not judged)
                apart.append(images[~learned])
                missing = self.plan.samples - len(self.pool)
                self.pool.add(images[learned][:missing], labels[learned][:missing])
                self._report("samples", len(self.pool), self.plan.samples, figures)
        self.held_out = torch.cat(apart)

    @property
    def _trains(self) -> bool:
        return self._learns and self.plan.steps > 0

    @property
    def _rounds(self) -> bool:
        return self.task.prepared.trainable and self.task.settings.rounding == "compensated"

    @torch.no_grad()
    def answered(self, images: Tensor) -> tuple[Tensor, Tensor, Figures]:
        """Images that nobody labelled, as a batch for :meth:`fill`: P's own answers are their labels."""
        images = sent(images, self.task.device)
        return images, self.task.teacher(images).argmax(1), {}

    def observe(self) -> None:
        """The observers see the pool; then the ranges are set, and the weights rounded to make up for each other."""
        prepared, settings = self.task.prepared, self.task.settings
        if not len(self.pool):
            raise ValueError("observe() and play() come after fill(): the pool holds no images")
        count = min(settings.range_samples, len(self.pool))
        images, _ = self.pool.draw(count)
        with self._timed("ranges"):
            seeded = fork_rng(self.task.seed, self.task.device)  # observers may keep some of what they see
            with seeded, torch.no_grad(), prepared.phase(Phase.OBSERVE):
                for start in range(0, count, self.plan.batch_size):
                    prepared.module(self._shown(images[start : start + self.plan.batch_size]))
                    self._report("ranges", min(count, start + self.plan.batch_size), count, {})
            prepared.set_ranges(settings.ranges)
        if self._rounds:
            with self._timed("rounding"):
                most = ROUNDED if self.task.teacher.facts.large else count
                self._round_weights(self._shown(images[:most]))

    def _round_weights(self, images: Tensor) -> None:
        prepared = self.task.prepared
        reference = prepared.reference()
        if self._trains and feature_weight(self.task.settings, prepared.lowest_bits):
            self._reference = reference

        def tell(layers: int, total: int) -> None:
            self._report("rounding", layers, total, {})

        seconds = None if self.plan.minutes is None else self.plan.minutes * 60 * ROUNDING
        best = None
        if len(self.held_out):
            best = self._best(prepared.weights())
            with prepared.phase(Phase.EVALUATE):
                best.look(0)
        late = round_weights(prepared, reference, images, self.rng, tell, seconds)
        if late:
            self.notes.append(
                f"{late} layers start at their nearest levels: there was no time for better ones"
            )
        if best is not None:
            with prepared.phase(Phase.EVALUATE):
                best.look(1)
            if best.restore():
                self.notes.append(
                    "weights start at their nearest levels: rounding that makes up for errors did harm"
                )

    def play(self, player: GeneratorPlayer | None = None) -> None:
        """Q learns from the pool; with a player, G keeps looking for samples between the two boundaries.

        Without replay one forward pass of Q on G's newest batch serves both players.

        Raises:
            SettingsError: a player, but settings of no game.
        """
        if player is not None and not isinstance(self.task.settings, AdaDFQSettings):
            raise SettingsError(
                f"a game with a generator needs AdaDFQSettings, not {type(self.task.settings).__name__}"
            )
        if not self._trains:
            done = (
                "its ranges were set and its weights rounded" if self._rounds else "the ranges alone were set"
            )
            self.notes.append(f"Q was not trained: {done}")
            return
        pace = self.plan.pace("game", spent=self.seconds.get("rounding", 0.0))
        task = self.task
        learner = QuantizedPlayer(
            task.prepared,
            task.teacher,
            task.settings,
            pace,
            self._reference,
            self.plan.batch_size,
            self._means(),
        )
        with self._timed("game"), learner.learning(), self._judged(learner, pace) as judge:
            for step in pace:
                if player is not None and self._is_round(pace):
                    figures = self._round(player, learner)
                else:
                    figures = self._lesson(learner, player)
                self._report("game", step, pace.total, {**figures, **judge()})
        self._done.append(f"{pace.step} of Q on {self.plan.batch_size} images each, {learner.rates}")
        self._tell(pace, "the training of Q")
        for name, skipped in (("Q", learner.skipped), ("G", player.skipped if player is not None else 0)):
            said = f"{skipped} updates of {name} were left out: their gradients were not finite"
            if 2 * skipped > pace.step and name == "Q":
                self.warnings.append(f"{said}; Q has hardly been trained")
            elif skipped:
                self.notes.append(said)

    def _means(self) -> SteadyMeans | None:
        prepared = self.task.prepared
        if not self.task.settings.steady_means:
            return None
        state = self.rng.get_state()  # training is to see the same images with and without
        images, _ = self.pool.draw(MEANS)
        images = self._shown(images)
        self.rng.set_state(state)
        with prepared.phase(Phase.EVALUATE):
            return SteadyMeans(prepared, images)

    def _best(self, parameters: Sequence[nn.Parameter]) -> BestState:
        task = self.task
        return BestState(task.prepared, task.teacher, self.held_out, parameters, task.settings.temperature)

    @contextmanager
    def _judged(self, learner: QuantizedPlayer, pace: Pace) -> Iterator[Callable[[], Figures]]:
        """What to ask after each step for figures of Q's state; at the end, training that did harm is taken back."""
        if not len(self.held_out):
            yield dict
            return
        best = self._best(learner.parameters)
        best.look(0)
        yield lambda: {"held_out": best.look(pace.step)} if best.due(pace.step, pace.total) else {}
        if best.looked < pace.step:  # a time limit is known to have ended only then
            best.look(pace.step)
        if best.restore():
            self.notes.append(
                f"Q is left as it was after {best.step} of {pace.step} steps: on images kept from training the last "
                "state was farther from P"
            )

    def _tell(self, pace: Pace, what: str) -> None:
        if pace.enough:
            self.notes.append(
                f"{what} ended after {pace.step} steps with time left: more have not helped elsewhere"
            )

    def _shown(self, images: Tensor) -> Tensor:
        """Samples as the network sees them."""
        return augment(images, self.rng) if self.views else images

    def _is_round(self, pace: Pace) -> bool:
        """Whether G moves: not where Q would hardly learn from what comes of it."""
        settings = self.task.settings
        if not isinstance(settings, AdaDFQSettings) or (pace.step - 1) % settings.generator_interval:
            return False
        return not settings.replay or settings.schedule != "cosine" or pace.fraction <= ROUNDS

    def _round(self, player: GeneratorPlayer, learner: QuantizedPlayer) -> Figures:
        """G moves on its newest batch. Q learns from the pool, which takes the batch in once it is refined.

        Without replay Q moves on the batch as it is.
        """
        settings = self.task.settings
        assert isinstance(settings, AdaDFQSettings)
        images, labels = player.make()
        quantized: Callable[[Tensor], Tensor] = self.task.prepared.module
        if settings.replay and self.task.teacher.facts.large:
            quantized = partial(in_pieces, quantized, size=PIECE // 2)
        with player.watching() as prior:
            z_p, z_q = self.task.teacher(images), quantized(images)
            for_g, figures = player.play(prior, z_p, z_q, labels, keep_graph=not settings.replay)
            if settings.replay:
                player.update(for_g)
                images, refined = player.refine(prior, images, labels, Pace(self._refine))
        if settings.replay:
            self.pool.add(images, labels)
            after = {f"refined_{name}": value for name, value in refined.items()}
            return {**figures, **after, **self._lesson(learner, player)}
        if learner.feature_weight:
            learner.answers(images.detach())
        loss = learner.loss(z_p, z_q)
        for_q = torch.autograd.grad(loss, learner.parameters, allow_unused=True)
        player.update(for_g)
        learner.update(for_q)
        self.pool.add(images, labels)
        return {**figures, "loss": loss.detach()}

    def _lesson(self, learner: QuantizedPlayer, player: GeneratorPlayer | None) -> Figures:
        """Q moves on kept samples, or on G's newest without replay; some of the batches are mixed."""
        settings = self.task.settings
        if player is not None and isinstance(settings, AdaDFQSettings) and not settings.replay:
            images, _ = player.sample()
        else:
            images, _ = self.pool.draw(self.plan.batch_size)
        images = mixed(self._shown(images), settings.mixup, self.rng)
        return {"loss": learner.learn(images, PIECE if self.task.teacher.facts.large else None)}

    def outcome(self, method: str) -> Outcome:
        """What the run leaves behind: as many samples as were asked for, the newest of the pool."""
        provenance = {
            "method": method,
            "seed": self.task.seed,
            "settings": self.task.settings.model_dump(mode="json"),
        }
        if self._done:
            self.notes.append(f"what was run: {'; '.join(self._done)}")
        images, labels = (each.cpu() for each in self.pool.newest(self.plan.samples))
        samples = SyntheticDataset(images, labels, self.task.teacher.facts, provenance)
        return Outcome(samples, self.history, self.notes, self.seconds, self.warnings)
