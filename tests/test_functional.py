"""The formulas against their NumPy twins, gradients against differences, properties and values by hand."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import twins
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from adadfq_plugin import functional

Array = npt.NDArray[np.float64]

ROWS, CLASSES = 5, 7
# By hand: softmax(z_p - z_q) = (3/4, 1/4) and softmax(z_p + z_q) = (7/8, 1/8).
HAND_P = torch.tensor([[math.log(21) / 2, 0.0]], dtype=torch.float64)
HAND_Q = torch.tensor([[math.log(7 / 3) / 2, 0.0]], dtype=torch.float64)
HAND_INFORMATION = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)


def t(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array))


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def approx(value: Any) -> Any:
    return pytest.approx(value, rel=1e-10, abs=1e-12)


@pytest.fixture(params=range(3))
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


@pytest.fixture
def z_p(rng: np.random.Generator) -> Array:
    return rng.normal(size=(ROWS, CLASSES), scale=2.0)


@pytest.fixture
def z_q(rng: np.random.Generator) -> Array:
    return rng.normal(size=(ROWS, CLASSES), scale=2.0)


@pytest.fixture
def hard(rng: np.random.Generator) -> npt.NDArray[np.int64]:
    return rng.integers(0, CLASSES, size=ROWS)


@pytest.fixture
def soft(rng: np.random.Generator) -> Array:
    return rng.dirichlet(np.ones(CLASSES), size=ROWS)


class TestTwins:
    """Every function equals its twin in float64."""

    @pytest.mark.parametrize("name", ["disagreement_loss", "agreement_loss"])
    def test_cross_entropies(
        self, name: str, z_p: Array, z_q: Array, hard: npt.NDArray[np.int64], soft: Array
    ) -> None:
        ours, twin = getattr(functional, name), getattr(twins, name)
        assert ours(t(z_p), t(z_q), t(soft)).item() == approx(twin(z_p, z_q, soft))
        expected = twin(z_p, z_q, twins.one_hot(hard, CLASSES))
        for dtype in (torch.int64, torch.int32, torch.uint8):
            assert ours(t(z_p), t(z_q), t(hard).to(dtype)).item() == approx(expected)

    def test_balance(self, z_p: Array, z_q: Array, soft: Array) -> None:
        ours = functional.balance_loss(t(z_p), t(z_q), t(soft), alpha_ds=0.7, alpha_as=1.3)
        assert ours.item() == approx(twins.balance_loss(z_p, z_q, soft, 0.7, 1.3))
        # The paper's weights are the defaults.
        default = functional.balance_loss(t(z_p), t(z_q), t(soft))
        assert default.item() == approx(twins.balance_loss(z_p, z_q, soft, 0.2, 0.1))

    def test_information(self, z_p: Array, z_q: Array) -> None:
        ours = functional.disagreement_information(t(z_p), t(z_q))
        expected = twins.disagreement_information(z_p, z_q)
        assert ours.numpy() == approx(expected)
        normalized = functional.normalized_information(ours, CLASSES)
        assert normalized.numpy() == approx(twins.normalized_information(expected, CLASSES))
        for minimum in (0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)):
            held = functional.normalized_information(ours, CLASSES, minimum=minimum)
            assert held.numpy() == approx(twins.normalized_information(expected, CLASSES, 0.25))

    def test_margin(self, rng: np.random.Generator) -> None:
        normalized = rng.uniform(size=20)
        ours = functional.margin_loss(t(normalized), 0.3, 0.7).item()
        assert ours == approx(twins.margin_loss(normalized, 0.3, 0.7))

    def test_bn_statistics(self, rng: np.random.Generator) -> None:
        lists = [[rng.normal(size=channels) for channels in (1, 3, 8)] for _ in range(4)]
        ours = functional.bn_statistics_loss(*([t(a) for a in values] for values in lists))
        assert ours.item() == approx(twins.bn_statistics_loss(*lists))

    def test_generator(self, rng: np.random.Generator) -> None:
        margin, balance, bns = rng.uniform(size=3).tolist()
        terms = t(margin), t(balance), t(bns)
        ours = functional.generator_loss(*terms, beta=0.3, gamma=2.5)
        assert ours.item() == approx(twins.generator_loss(margin, balance, bns, 0.3, 2.5))
        # The paper's weights are the defaults.
        default = functional.generator_loss(*terms).item()
        assert default == approx(twins.generator_loss(margin, balance, bns, 1.0, 1.0))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0, 20.0])
    @pytest.mark.parametrize("name", ["quantized_loss", "kl_divergence_loss"])
    def test_losses_of_q(self, name: str, temperature: float, z_p: Array, z_q: Array) -> None:
        ours = getattr(functional, name)(t(z_p), t(z_q), temperature=temperature).item()
        assert ours == approx(getattr(twins, name)(z_p, z_q, temperature))

    def test_features(self, rng: np.random.Generator) -> None:
        p, q = ([rng.normal(size=shape) for shape in ((4, 3), (2, 5, 2, 2), (3,))] for _ in range(2))
        p.append(np.full((2, 2), 3.0))  # no signal
        q.append(rng.normal(size=(2, 2)))
        ours = functional.feature_loss([t(a) for a in p], [t(a) for a in q]).item()
        assert ours == approx(twins.feature_loss(p, q))
        constant = torch.full((3, 1001), 0.1)  # the mean of which is rounded
        assert functional.feature_loss([constant], [torch.zeros(3, 1001)]).item() == 0

    @pytest.mark.parametrize("ours", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("others", [torch.contiguous_format, torch.channels_last])
    def test_features_in_any_layout(
        self, rng: np.random.Generator, ours: torch.memory_format, others: torch.memory_format
    ) -> None:
        p, q = (rng.normal(size=(2, 3, 4, 5)) for _ in range(2))
        of_q = t(q).contiguous(memory_format=ours).requires_grad_(True)
        loss = functional.feature_loss([t(p).contiguous(memory_format=others)], [of_q])
        assert loss.item() == approx(twins.feature_loss([p], [q]))
        (gradient,) = torch.autograd.grad(loss, of_q)
        assert gradient.is_contiguous(memory_format=ours)
        torch.testing.assert_close(gradient, 2 * (of_q - t(p)).detach() / p.size / t(p).var(correction=0))

    def test_total_variation(self, rng: np.random.Generator) -> None:
        images = rng.normal(size=(2, 3, 5, 4))
        assert functional.total_variation(t(images)).item() == approx(twins.total_variation(images))

    def test_squared_norm(self, rng: np.random.Generator) -> None:
        images = rng.normal(size=(2, 3, 5, 4))
        assert functional.squared_norm(t(images)).item() == approx(twins.squared_norm(images))

    def test_patch_similarity_entropy(self, rng: np.random.Generator) -> None:
        tokens = rng.normal(size=(3, 7, 4))  # 21 pairs
        ours = functional.patch_similarity_entropy(t(tokens)).numpy()
        assert ours == approx(twins.patch_similarity_entropy(tokens, 0.05, 48))
        ours = functional.patch_similarity_entropy(t(tokens), bandwidth=0.2, points=9, pairs=5).numpy()
        assert ours == approx(twins.patch_similarity_entropy(tokens, 0.2, 9, every=5))
        for count, pairs in ((2, 1), (3, 2), (50, 128), (50, 10**6)):
            tokens = rng.normal(size=(2, count, 4))
            every = -(-(count * (count - 1) // 2) // pairs)
            ours = functional.patch_similarity_entropy(t(tokens), pairs=pairs).numpy()
            assert ours == approx(twins.patch_similarity_entropy(tokens, 0.05, 48, every=every))

    def test_patches_of_a_large_map_are_compared_in_little_memory(self) -> None:
        """Of 50,000 places all pairs would take 20 GB."""
        i, j = functional.images._some_pairs(224 * 224, 128)
        assert len(i) == 128
        assert bool((i < j).all())
        assert int(i.min()) == 0
        assert 49_900 < int(j.max()) < 224 * 224

    def test_head_similarity(self, rng: np.random.Generator) -> None:
        attention = rng.dirichlet(np.ones(6), size=(2, 3, 5))
        assert functional.head_similarity(t(attention)).numpy() == approx(twins.head_similarity(attention))

    @pytest.mark.parametrize(("groups", "outputs", "count"), [(3, 4, 9), (1, 5, 150)])
    def test_compensated_weights(
        self, rng: np.random.Generator, groups: int, outputs: int, count: int
    ) -> None:
        """More inputs than are carried over at a time, fewer samples than inputs, one input that is always zero."""
        inputs = rng.normal(size=(groups, 100, count)) @ rng.normal(size=(groups, count, count))
        inputs[:, :, 2] = 0
        moments = inputs.transpose(0, 2, 1) @ inputs / 100
        weight = rng.normal(size=(groups, outputs, count))
        step = rng.uniform(0.2, 0.4, size=(groups, outputs))
        lower, upper = -8 * step, 7 * step
        ours = functional.compensated_weights(*map(t, (weight, step, lower, upper, moments)), damping=0.02)
        expected = twins.compensated_weights(weight, step, lower, upper, moments, 0.02)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6, atol=1e-7)
        # and it does what it is for
        grid = step[:, :, None]
        rounded = np.round(ours.numpy() / grid) * grid
        nearest = np.round(np.clip(weight, lower[:, :, None], upper[:, :, None]) / grid) * grid
        error, plain = (
            np.square((each - weight) @ inputs.transpose(0, 2, 1)).mean() for each in (rounded, nearest)
        )
        assert error < 0.9 * plain

    @pytest.mark.parametrize(("groups", "kernel"), [(1, ()), (2, (3, 3)), (6, (5,))])
    def test_rounding_shift(self, rng: np.random.Generator, groups: int, kernel: tuple[int, ...]) -> None:
        weight = rng.normal(size=(6, 4, *kernel))
        means = rng.normal(size=(groups, weight[0].size))
        ours = functional.rounding_shift(t(weight), t(weight.round()), t(means)).numpy()
        assert ours == approx(twins.rounding_shift(weight, weight.round(), means))

    def test_metrics(self, z_p: Array, z_q: Array, hard: npt.NDArray[np.int64]) -> None:
        z_q[:3] = z_p[:3] + 0.01
        assert functional.top1_accuracy(t(z_p), t(hard)) == twins.top1_accuracy(z_p, hard)
        assert functional.top1_agreement(t(z_p), t(z_q)) == twins.top1_agreement(z_p, z_q)
        assert functional.sqnr_db(t(z_p), t(z_q)) == approx(twins.sqnr_db(z_p, z_q))


class TestByHand:
    """Values worked out on paper from the probabilities 3/4, 1/4 and 7/8, 1/8."""

    @pytest.mark.parametrize(("label", "ds", "as_"), [(0, 4 / 3, 8 / 7), (1, 4.0, 8.0)])
    def test_cross_entropies(self, label: int, ds: float, as_: float) -> None:
        y = torch.tensor([label])
        assert functional.disagreement_loss(HAND_P, HAND_Q, y).item() == approx(math.log(ds))
        assert functional.agreement_loss(HAND_P, HAND_Q, y).item() == approx(math.log(as_))
        expected = 0.2 * math.log(ds) + 0.1 * math.log(as_)
        assert functional.balance_loss(HAND_P, HAND_Q, y).item() == approx(expected)

    def test_information(self) -> None:
        assert functional.disagreement_information(HAND_P, HAND_Q).tolist() == approx([HAND_INFORMATION])
        assert approx(0.5623351446188083) == HAND_INFORMATION

    def test_losses_of_q(self) -> None:
        z_p, z_q = 2 * (HAND_P - HAND_Q), torch.zeros_like(HAND_P)
        quantized = functional.quantized_loss(z_p, z_q, temperature=2.0).item()
        assert quantized == approx(-4 * HAND_INFORMATION)
        # P is (3/4, 1/4) and Q is (1/2, 1/2); the other direction would give 4 * 0.143841.
        kl = functional.kl_divergence_loss(z_p, z_q, temperature=2.0).item()
        assert kl == approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))

    def test_margin(self) -> None:
        normalized = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        assert functional.margin_loss(normalized, 0.1, 0.8).item() == approx((0.1 + 0.2) / 3)

    def test_bn_statistics_weighs_layers_not_channels(self) -> None:
        wide, narrow = torch.zeros(10), torch.zeros(1)
        loss = functional.bn_statistics_loss(
            [wide, narrow + 2], [wide, narrow], [wide, narrow], [wide, narrow]
        )
        assert loss.item() == 2.0

    def test_total_variation(self) -> None:
        # Two rows, three columns: down |3 - 0| three times, to the right 1 and 2 in both rows.
        image = torch.tensor([[[[0.0, 1.0, 3.0], [3.0, 4.0, 6.0]]]])
        assert functional.total_variation(image).item() == 3.0 + 1.5

    def test_patches(self) -> None:
        # One normal density at 1; or two that do not touch, of weights 2/3 and 1/3, at 0 and 1.
        right, up = [1.0, 0.0], [0.0, 1.0]
        triples = torch.tensor([[right, right, right], [right, up, up]], dtype=torch.float64)
        alike, spread = functional.patch_similarity_entropy(triples, bandwidth=0.02, points=400).tolist()
        normal = 0.5 * (1 + math.log(2 * math.pi)) + math.log(0.02)
        assert alike == pytest.approx(normal, abs=2e-4)  # cut at four widths
        mixture = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
        assert spread == pytest.approx(normal + mixture, abs=2e-4)

    def test_heads(self) -> None:
        same = torch.tensor([0.5, 0.5, 0.0, 0.0])
        opposite = same.flip(0)
        attention = torch.stack([same, opposite])[None, :, None]
        # In units of even attention: means 1, variances 1, covariance -1.
        assert functional.head_similarity(attention).item() == pytest.approx((-2 + 9e-4) / (2 + 9e-4))

    def test_metrics(self) -> None:
        logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
        assert functional.top1_accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75
        assert functional.top1_agreement(logits, logits.flip(1)) == 0.0
        assert functional.sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])) == 0.0
        assert functional.sqnr_db(torch.tensor([30.0, 40.0]), torch.tensor([30.0, 45.0])) == pytest.approx(20)


def gradient_cases() -> dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]]:
    y = torch.tensor([0, 3, 2, 1])
    logits: list[tuple[int, ...]] = [(4, 5), (4, 5)]

    def normalized(a: Tensor, b: Tensor) -> Tensor:
        return functional.normalized_information(functional.disagreement_information(a, b), 5)

    def bn(*x: Tensor) -> Tensor:
        return functional.bn_statistics_loss(x[0:2], x[2:4], x[4:6], x[6:8])

    return {
        "disagreement": (lambda a, b: functional.disagreement_loss(a, b, y), logits),
        "disagreement_soft": (lambda a, b, c: functional.disagreement_loss(a, b, c), [*logits, (4, 5)]),
        "agreement": (lambda a, b: functional.agreement_loss(a, b, y), logits),
        "balance": (lambda a, b: functional.balance_loss(a, b, y), logits),
        "information": (functional.disagreement_information, logits),
        "normalized": (normalized, logits),
        "margin": (lambda a, b: functional.margin_loss(normalized(a, b), 0.3, 0.6), logits),
        "bn_statistics": (bn, [(2,), (3,)] * 4),
        "generator": (lambda a, b, c: functional.generator_loss(a, b, c, beta=0.5, gamma=2.0), [()] * 3),
        "quantized": (lambda a, b: functional.quantized_loss(a, b, temperature=3.0), logits),
        "kl_divergence": (lambda a, b: functional.kl_divergence_loss(a, b, temperature=3.0), logits),
        "features": (lambda *x: functional.feature_loss(x[:2], x[2:]), [(2, 3), (4,)] * 2),
        "total_variation": (functional.total_variation, [(2, 2, 3, 4)]),
        "squared_norm": (functional.squared_norm, [(2, 2, 3, 4)]),
        "patch_similarity": (
            lambda x: functional.patch_similarity_entropy(x, bandwidth=0.3),
            [(2, 4, 3)],
        ),
        "head_similarity": (functional.head_similarity, [(2, 3, 2, 4)]),
        "rounding_shift": (functional.rounding_shift, [(4, 3, 2), (4, 3, 2), (2, 6)]),
    }


@pytest.mark.parametrize("name", gradient_cases())
def test_gradients(name: str) -> None:
    function, shapes = gradient_cases()[name]
    rng = np.random.default_rng(7)
    inputs = [t(rng.normal(size=shape)).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs)


class TestGradientFlow:
    """Which arguments move, and in which direction."""

    def test_generator_and_networks_get_gradients(self) -> None:
        z_p, z_q = HAND_P.clone().requires_grad_(), HAND_Q.clone().requires_grad_()
        of_p, of_q = gradients(functional.disagreement_information(z_p, z_q).sum(), z_p, z_q)
        # dH/dd_c = -p_c (ln p_c + H), by hand for class 1.
        assert of_p[0, 1].item() == approx(-0.25 * (math.log(0.25) + HAND_INFORMATION))
        assert torch.equal(of_p, -of_q)

    def test_minimum_of_the_batch_is_part_of_the_graph(self) -> None:
        information = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
        span = math.log(4) - 0.5
        (gradient,) = gradients(functional.normalized_information(information, 4)[1], information)
        # d/dm of (H - m) / (ln C - m) is (H - ln C) / (ln C - m)^2.
        assert gradient.tolist() == approx([(1 - math.log(4)) / span**2, 1 / span])

    def test_given_minimum_holds_the_scale(self) -> None:
        information = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
        held = functional.normalized_information(information, 4, minimum=information.detach().amin())
        (gradient,) = gradients(held[1], information)
        assert gradient.tolist() == approx([0.0, 1 / (math.log(4) - 0.5)])

    def test_saturated_entropy_keeps_its_gradient(self) -> None:
        # A float32 entropy of nearly equal logits rounds to ln C or above, where a clamp would stop the training.
        generator = torch.Generator().manual_seed(0)
        z_p = torch.randn(64, 1000, generator=generator)
        z_q = (z_p + 0.01 * torch.randn(64, 1000, generator=generator)).requires_grad_()
        (gradient,) = gradients(functional.quantized_loss(z_p, z_q, temperature=20.0), z_q)
        # To first order the gradient is that of half the variance: (z_q - z_p) / C without its mean over classes.
        difference = (z_q - z_p).detach().double()
        expected = (difference - difference.mean(dim=1, keepdim=True)) / 1000 / 64
        relative = (gradient.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert relative.max() < 0.01


class TestQEqualsP:
    """Full agreement: ln C, 1, finite values, finite gradients."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("classes", [2, 3, 10, 1000])
    @pytest.mark.parametrize("shift", [0.0, 3.7])
    def test_everything_is_finite(self, dtype: torch.dtype, classes: int, shift: float) -> None:
        generator = torch.Generator().manual_seed(0)
        z_p = torch.randn(4, classes, generator=generator, dtype=dtype).requires_grad_()
        z_q = z_p.detach().clone().requires_grad_()
        information = functional.disagreement_information(z_p + shift, z_q)
        normalized = functional.normalized_information(information, classes)
        margin = functional.margin_loss(normalized, 0.1, 0.8)
        y = torch.zeros(4, dtype=torch.int64)
        balance = functional.balance_loss(z_p, z_q, y)
        quantized = functional.quantized_loss(z_p, z_q, temperature=4.0)
        kl = functional.kl_divergence_loss(z_p, z_q, temperature=4.0)
        assert normalized.tolist() == [1.0] * 4
        assert margin.item() == pytest.approx(0.2)
        assert information.detach().double().numpy() == pytest.approx(math.log(classes), rel=1e-5)
        assert quantized.item() == pytest.approx(-16 * math.log(classes), rel=1e-5)
        assert kl.item() == 0.0
        for value in (margin, balance, quantized, kl):
            for gradient in torch.autograd.grad(value, (z_p, z_q), retain_graph=True):
                assert gradient.isfinite().all()

    def test_one_agreeing_sample_has_one(self) -> None:
        z_p = torch.tensor([[5.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
        z_q = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
        information = functional.disagreement_information(z_p, z_q)
        assert functional.normalized_information(information, 3).tolist() == approx([0.0, 1.0])

    def test_minimum_at_the_maximum(self) -> None:
        information = torch.full((3,), math.log(5), dtype=torch.float64)
        assert functional.normalized_information(information, 5, minimum=math.log(5)).tolist() == [1.0] * 3

    def test_small_disagreement_is_not_rounded_away(self) -> None:
        information = torch.tensor([math.log(10) - 1e-4, math.log(10)], dtype=torch.float32)
        assert functional.normalized_information(information, 10).tolist() == [0.0, 1.0]


logit_pairs = st.tuples(st.integers(1, 4), st.integers(2, 6)).flatmap(
    lambda shape: st.tuples(*[arrays(np.float64, shape, elements=st.floats(-30, 30))] * 2)
)
shares = arrays(np.float64, st.integers(1, 8), elements=st.floats(0, 1))


class TestProperties:
    @given(logit_pairs)
    def test_information_is_bounded(self, pair: tuple[Array, Array]) -> None:
        for dtype in (torch.float32, torch.float64):
            information = functional.disagreement_information(*(t(z).to(dtype) for z in pair))
            assert (information >= 0).all()
            assert (information <= torch.tensor(math.log(pair[0].shape[1]), dtype=dtype)).all()

    @given(logit_pairs, st.floats(-100, 100))
    def test_information_ignores_a_constant(self, pair: tuple[Array, Array], constant: float) -> None:
        z_p, z_q = map(t, pair)
        information = functional.disagreement_information(z_p, z_q)
        assert torch.allclose(functional.disagreement_information(z_p + constant, z_q), information)
        assert torch.allclose(functional.disagreement_information(z_p, z_q + constant), information)

    @given(logit_pairs, st.randoms(use_true_random=False))
    def test_information_ignores_the_order_of_classes(self, pair: tuple[Array, Array], random: Any) -> None:
        order = list(range(pair[0].shape[1]))
        random.shuffle(order)
        information = functional.disagreement_information(*map(t, pair))
        permuted = functional.disagreement_information(t(pair[0][:, order]), t(pair[1][:, order]))
        assert torch.allclose(permuted, information)

    def test_information_changes_when_p_and_q_are_swapped(self) -> None:
        # The sign of the difference matters from three classes on: (1/2, 1/4, 1/4) against (1/5, 2/5, 2/5).
        z_p = torch.tensor([[math.log(2), 0.0, 0.0]], dtype=torch.float64)
        zero = torch.zeros_like(z_p)
        assert functional.disagreement_information(z_p, zero).item() == approx(1.5 * math.log(2))
        expected = 0.2 * math.log(5) + 0.8 * math.log(2.5)
        assert functional.disagreement_information(zero, z_p).item() == approx(expected)

    @given(logit_pairs)
    def test_normalized_is_bounded_and_touches_zero(self, pair: tuple[Array, Array]) -> None:
        classes = pair[0].shape[1]
        information = functional.disagreement_information(*map(t, pair))
        normalized = functional.normalized_information(information, classes)
        assert (normalized >= 0).all()
        assert (normalized <= 1).all()
        assume(math.log(classes) - information.min() > 1e-9)
        assert normalized[information.argmin()] == 0

    @given(shares)
    def test_margin_is_zero_exactly_inside(self, normalized: Array) -> None:
        values = t(normalized).requires_grad_()
        loss = functional.margin_loss(values, 0.25, 0.75)
        (gradient,) = gradients(loss, values)
        inside = (normalized >= 0.25) & (normalized <= 0.75)
        assert (loss.item() == 0) == bool(inside.all())
        # Outside, gradient descent moves a sample inwards.
        signs = np.where(normalized < 0.25, -1, np.where(normalized > 0.75, 1, 0))
        assert gradient.sign().numpy().tolist() == signs.tolist()

    @given(logit_pairs, st.floats(0, 3), st.floats(0, 3))
    def test_balance_is_the_weighted_sum(self, pair: tuple[Array, Array], ds: float, as_: float) -> None:
        z_p, z_q = map(t, pair)
        y = torch.zeros(len(z_p), dtype=torch.int64)
        expected = ds * functional.disagreement_loss(z_p, z_q, y) + as_ * functional.agreement_loss(
            z_p, z_q, y
        )
        balance = functional.balance_loss(z_p, z_q, y, alpha_ds=ds, alpha_as=as_)
        assert balance.item() == approx(expected.item())

    @given(logit_pairs)
    def test_quantized_loss_at_high_temperature_is_half_the_variance(self, pair: tuple[Array, Array]) -> None:
        # Entropy of a tilted uniform law: ln C - k2 / (2 T^2) - k3 / (3 T^3) - k4 / (8 T^4) ..., k its cumulants.
        z_p, z_q = pair[0] / 30, pair[1] / 30
        difference = z_p - z_q
        centred = difference - difference.mean(axis=1, keepdims=True)
        half_variance = (centred**2).mean(axis=1).mean() / 2
        skew = (centred**3).mean(axis=1).mean() / 3
        temperature = 100.0
        loss = functional.quantized_loss(t(z_p), t(z_q), temperature=temperature).item()
        above = loss + temperature**2 * math.log(z_p.shape[1])
        assert above == pytest.approx(half_variance + skew / temperature, abs=2e-4)
        assert above == pytest.approx(half_variance, abs=0.01 * 2)
        assert loss <= 0

    @given(logit_pairs, st.floats(0.5, 30))
    def test_kl_is_not_negative(self, pair: tuple[Array, Array], temperature: float) -> None:
        z_p, z_q = map(t, pair)
        assert functional.kl_divergence_loss(z_p, z_q, temperature=temperature) >= -1e-9
        shifted = functional.kl_divergence_loss(z_p, z_p + 2, temperature=temperature)
        assert shifted.item() == pytest.approx(0, abs=1e-9)

    @given(logit_pairs)
    def test_sqnr_ignores_a_common_factor(self, pair: tuple[Array, Array]) -> None:
        reference, approximation = pair
        assume(np.abs(reference).max() > 1e-3)
        assume(np.abs(reference - approximation).max() > 1e-3)
        expected = functional.sqnr_db(t(reference), t(approximation))
        assert functional.sqnr_db(t(-4 * reference), t(-4 * approximation)) == approx(expected)


class TestPrecision:
    """Half precision comes in, float32 goes out; large logits stay finite."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        z_p = torch.randn(4, 6, generator=generator).to(dtype)
        z_q = torch.randn(4, 6, generator=generator).to(dtype)
        y = torch.tensor([0, 1, 2, 3])
        images = z_p.reshape(1, 1, 4, 6)
        pairs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "ds": lambda a, b: functional.disagreement_loss(a, b, y),
            "as": lambda a, b: functional.agreement_loss(a, b, b),
            "information": functional.disagreement_information,
            "normalized": lambda a, _: functional.normalized_information(a[0].abs() / 8, 6),
            "margin": lambda a, _: functional.margin_loss(a[0].abs(), 0.1, 0.2),
            "quantized": lambda a, b: functional.quantized_loss(a, b, temperature=20.0),
            "kl": lambda a, b: functional.kl_divergence_loss(a, b, temperature=20.0),
            "bns": lambda a, b: functional.bn_statistics_loss([a[0]], [b[0]], [a[1]], [b[1]]),
            "generator": lambda a, b: functional.generator_loss(a[0, 0], b[0, 0], a[0, 1], beta=0.3),
            "tv": lambda a, _: functional.total_variation(a.reshape(images.shape)),
        }
        for name, function in pairs.items():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = function(z_p, z_q)
            assert half.dtype == torch.float32, name
            assert torch.allclose(half, function(z_p.float(), z_q.float())), name

    def test_float64_stays(self) -> None:
        assert functional.disagreement_information(HAND_P, HAND_Q).dtype == torch.float64
        assert functional.balance_loss(HAND_P, HAND_Q, torch.tensor([0])).dtype == torch.float64

    def test_overconfident_logits_stay_finite(self) -> None:
        z_p = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
        z_q = torch.tensor([[-1e4, 0.0, 1e4]])
        assert functional.disagreement_information(z_p, z_q).item() == 0.0
        assert functional.disagreement_loss(z_p, z_q, torch.tensor([2])).item() == 4e4
        assert functional.kl_divergence_loss(z_p, z_q, temperature=1.0).item() == 2e4
        (gradient,) = gradients(functional.quantized_loss(z_p, z_q, temperature=1.0), z_p)
        assert gradient.isfinite().all()

    def test_nan_never_counts_as_right(self) -> None:
        nan = torch.full((2, 3), math.nan)
        assert functional.top1_accuracy(nan, torch.tensor([0, 0])) == 0.0
        assert functional.top1_agreement(nan, nan) == 0.0
        good = torch.tensor([[1.0, 0.0, 0.0]] * 2)
        assert functional.top1_agreement(good, nan) == 0.0
        assert functional.top1_agreement(nan, good) == 0.0

    def test_sqnr_at_its_ends(self) -> None:
        one, zero = torch.ones(3), torch.zeros(3)
        assert functional.sqnr_db(one, one) == math.inf
        assert functional.sqnr_db(zero, zero) == math.inf
        assert functional.sqnr_db(zero, one) == -math.inf
        assert math.isnan(functional.sqnr_db(one, one * math.nan))


Z = torch.zeros(4, 3)
Y = torch.zeros(4, dtype=torch.int64)
H = torch.full((4,), 0.5)
V = [torch.zeros(2)]


def rounded(**changes: Any) -> Tensor:
    """The weights of one group of 4 outputs of 3 inputs."""
    fitting: dict[str, Any] = {"weight": Z[None], "moments": torch.eye(3)[None]}
    fitting |= dict.fromkeys(("step", "lower", "upper"), torch.ones(1, 4))
    return functional.compensated_weights(**{**fitting, **changes})


MISUSE: list[tuple[str, Callable[[], object], str]] = [
    (
        "shift_shapes",
        lambda: functional.rounding_shift(Z, Z[:2], Z),
        r"one shape .* got \(4, 3\) and \(2, 3\)",
    ),
    ("shift_vector", lambda: functional.rounding_shift(V[0], V[0], Z), r"one shape \(outputs, inputs"),
    ("shift_inputs", lambda: functional.rounding_shift(Z, Z, Z[:1, :2]), r"means .* \(groups, 3\)"),
    ("shift_groups", lambda: functional.rounding_shift(Z, Z, Z[:3]), r"groups of 4; got \(3, 3\)"),
    ("z_p_vector", lambda: functional.disagreement_loss(Z[0], Z[0], Y), r"z_p must have the shape \(N, C\)"),
    ("z_p_empty", lambda: functional.agreement_loss(Z[:0], Z[:0], Y[:0]), r"z_p .* N >= 1"),
    ("z_p_one_class", lambda: functional.disagreement_information(Z[:, :1], Z[:, :1]), r"z_p .* C >= 2"),
    ("z_p_integer", lambda: functional.disagreement_information(Z.long(), Z), r"z_p must be floating point"),
    ("z_q_shape", lambda: functional.balance_loss(Z, Z[:, :2], Y), r"z_q .* z_p, \(4, 3\); got \(4, 2\)"),
    ("z_q_broadcast", lambda: functional.quantized_loss(Z, Z[:1], temperature=1), r"z_q must have the shape"),
    (
        "z_q_integer",
        lambda: functional.kl_divergence_loss(Z, Z.int(), temperature=1),
        r"z_q must be floating",
    ),
    ("y_length", lambda: functional.disagreement_loss(Z, Z, Y[:3]), r"y must be integers of shape \(4,\) or"),
    (
        "y_float",
        lambda: functional.agreement_loss(Z, Z, Y.float()),
        r"y must be integers .* got torch.float32",
    ),
    (
        "y_integer_rows",
        lambda: functional.agreement_loss(Z, Z, Z.long()),
        r"y must be integers .* got torch.int64",
    ),
    ("y_bool", lambda: functional.agreement_loss(Z, Z, Y.bool()), r"y must be integers .* got torch.bool"),
    ("y_high", lambda: functional.disagreement_loss(Z, Z, Y + 3), r"y must be in \[0, 3\); got 3 to 3"),
    ("y_ignored", lambda: functional.balance_loss(Z, Z, Y - 100), r"y must be in \[0, 3\); got -100"),
    ("alpha_ds", lambda: functional.balance_loss(Z, Z, Y, alpha_ds=-0.1), r"alpha_ds must be finite and not"),
    ("alpha_as", lambda: functional.balance_loss(Z, Z, Y, alpha_as=math.nan), r"alpha_as must be finite"),
    (
        "information",
        lambda: functional.normalized_information(Z, 3),
        r"information must have the shape \(N,\)",
    ),
    ("information_empty", lambda: functional.normalized_information(H[:0], 3), r"information .* N >= 1"),
    ("information_int", lambda: functional.normalized_information(Y, 3), r"information must be floating"),
    (
        "num_classes",
        lambda: functional.normalized_information(H, 1),
        r"num_classes must be at least 2; got 1",
    ),
    ("minimum_high", lambda: functional.normalized_information(H, 3, minimum=2.0), r"minimum must be in \[0"),
    ("minimum_low", lambda: functional.normalized_information(H, 3, minimum=-0.1), r"minimum must be in \[0"),
    ("minimum_rows", lambda: functional.normalized_information(H, 3, minimum=H), r"minimum must be a number"),
    ("normalized", lambda: functional.margin_loss(Z, 0.1, 0.8), r"normalized must have the shape \(N,\)"),
    ("normalized_empty", lambda: functional.margin_loss(H[:0], 0.1, 0.8), r"normalized .* N >= 1"),
    ("normalized_int", lambda: functional.margin_loss(Y, 0.1, 0.8), r"normalized must be floating"),
    ("bounds_order", lambda: functional.margin_loss(H, 0.8, 0.1), r"lower and upper must .* got 0.8 and 0.1"),
    ("bounds_equal", lambda: functional.margin_loss(H, 0.5, 0.5), r"lower and upper must satisfy"),
    ("bounds_high", lambda: functional.margin_loss(H, 0.5, 1.5), r"lower and upper must satisfy"),
    ("bounds_low", lambda: functional.margin_loss(H, -0.5, 0.5), r"lower and upper must satisfy"),
    (
        "no_layer",
        lambda: functional.bn_statistics_loss([], [], [], []),
        r"batch_means must hold at least one",
    ),
    (
        "layers",
        lambda: functional.bn_statistics_loss(V, V, V, V * 2),
        r"running_vars .* batch_means, 1; got 2",
    ),
    ("bn_rank", lambda: functional.bn_statistics_loss([Z], [Z], [Z], [Z]), r"batch_means\[0\] .* \(C,\)"),
    ("bn_shape", lambda: functional.bn_statistics_loss(V, V, [Z[0]], V), r"running_means\[0\] .* \(3,\)"),
    (
        "bn_int",
        lambda: functional.bn_statistics_loss(V, [V[0].int()], V, V),
        r"batch_vars\[0\] must be float",
    ),
    ("margin_rows", lambda: functional.generator_loss(H, H[0], H[0]), r"margin must be a scalar .* \(4,\)"),
    ("balance_rows", lambda: functional.generator_loss(H[0], H, H[0]), r"balance must be a scalar"),
    ("bns_rows", lambda: functional.generator_loss(H[0], H[0], H), r"bns must be a scalar"),
    ("bns_int", lambda: functional.generator_loss(H[0], H[0], Y[0]), r"bns must be floating point"),
    ("beta", lambda: functional.generator_loss(H[0], H[0], H[0], beta=-1), r"beta must be finite and not"),
    ("gamma", lambda: functional.generator_loss(H[0], H[0], H[0], gamma=math.inf), r"gamma must be finite"),
    (
        "temperature",
        lambda: functional.quantized_loss(Z, Z, temperature=0),
        r"temperature must be finite and",
    ),
    (
        "temperature_inf",
        lambda: functional.kl_divergence_loss(Z, Z, temperature=math.inf),
        r"temperature must",
    ),
    ("temperature_neg", lambda: functional.kl_divergence_loss(Z, Z, temperature=-1), r"temperature must be"),
    ("no_feature", lambda: functional.feature_loss([], []), r"features_p must hold at least one layer"),
    ("features", lambda: functional.feature_loss([Z], [Z, Z]), r"features_q .* as features_p, 1; got 2"),
    (
        "feature_empty",
        lambda: functional.feature_loss([Z[:0]], [Z[:0]]),
        r"features_p\[0\] must hold at least",
    ),
    ("feature_shape", lambda: functional.feature_loss([Z], [Z[0]]), r"features_q\[0\] must have the shape"),
    ("feature_int", lambda: functional.feature_loss([Y], [Y]), r"features_p\[0\] must be floating point"),
    ("images_rank", lambda: functional.total_variation(Z), r"images must have the shape \(N, C, H, W\)"),
    ("images_thin", lambda: functional.total_variation(torch.zeros(1, 1, 1, 4)), r"images .* H, W >= 2"),
    ("images_empty", lambda: functional.total_variation(torch.zeros(0, 1, 4, 4)), r"images must have"),
    (
        "images_int",
        lambda: functional.total_variation(torch.zeros(1, 1, 4, 4).byte()),
        r"images must be float",
    ),
    ("norm_rank", lambda: functional.squared_norm(Z), r"images must have the shape \(N, C, H, W\)"),
    ("tokens", lambda: functional.patch_similarity_entropy(Z), r"tokens must have the shape \(N, T, D\)"),
    (
        "token",
        lambda: functional.patch_similarity_entropy(torch.zeros(2, 1, 3)),
        r"tokens must have the shape \(N, T, D\) with T >= 2; got \(2, 1, 3\)",
    ),
    (
        "bandwidth",
        lambda: functional.patch_similarity_entropy(torch.zeros(2, 2, 3), bandwidth=0),
        r"bandwidth must be finite and positive; got 0",
    ),
    (
        "points",
        lambda: functional.patch_similarity_entropy(torch.zeros(2, 2, 3), points=1),
        r"points must be at least 2 and pairs at least 1; got 1 and 512",
    ),
    ("attention", lambda: functional.head_similarity(Z), r"attention must have the shape \(N, h, T, S\)"),
    (
        "one_head",
        lambda: functional.head_similarity(torch.zeros(2, 1, 3, 3)),
        r"attention must have the shape .* h >= 2; got \(2, 1, 3, 3\)",
    ),
    ("weight", lambda: rounded(weight=Z), r"weight must have the shape \(groups, outputs, K\); got \(4, 3\)"),
    ("step", lambda: rounded(step=H), r"step must have the shape \(1, 4\); got \(4,\)"),
    ("lower", lambda: rounded(lower=H), r"lower must have the shape \(1, 4\); got \(4,\)"),
    ("upper", lambda: rounded(upper=Z), r"upper must have the shape \(1, 4\); got \(4, 3\)"),
    ("moments", lambda: rounded(moments=Z), r"moments must have the shape \(1, 3, 3\); got \(4, 3\)"),
    ("damping", lambda: rounded(damping=0.0), r"damping must be finite and positive; got 0.0"),
    ("logits", lambda: functional.top1_accuracy(H, Y), r"logits must have the shape"),
    ("labels", lambda: functional.top1_accuracy(Z, Y[:2]), r"labels must be integers of shape \(4,\); got"),
    ("labels_range", lambda: functional.top1_accuracy(Z, Y - 1), r"labels must be in \[0, 3\)"),
    ("labels_soft", lambda: functional.top1_accuracy(Z, Z), r"labels must be integers of shape \(4,\); got"),
    ("a", lambda: functional.top1_agreement(H, H), r"a must have the shape \(N, C\)"),
    ("b", lambda: functional.top1_agreement(Z, Z[:2]), r"b must have the shape of a, \(4, 3\); got \(2, 3\)"),
    ("reference", lambda: functional.sqnr_db(Z[:0], Z[:0]), r"reference must hold at least one element"),
    ("reference_int", lambda: functional.sqnr_db(Y, Y), r"reference must be floating point; got torch.int64"),
    ("approximation", lambda: functional.sqnr_db(Z, Z[0]), r"approximation must have the shape of reference"),
]


@pytest.mark.parametrize(("misuse", "message"), [pytest.param(f, m, id=i) for i, f, m in MISUSE])
def test_misuse_names_the_argument(misuse: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse()


def test_every_function_is_documented_alike() -> None:
    for name in functional.__all__:
        function = getattr(functional, name)
        doc = inspect.getdoc(function) or ""
        parts = [".. math::", "Args:", "Returns:", "Raises:", "Example:", ">>> ", "Source: "]
        assert [part for part in parts if part not in doc] == [], name
        assert [p for p in inspect.signature(function).parameters if f"    {p}: " not in doc] == [], name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_moments_against_numpy_and_gradcheck(layout: torch.memory_format) -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, (3, 4, 5, 2))
    x = torch.from_numpy(values).to(memory_format=layout).requires_grad_()
    mean, variance = functional.channel_moments(x)
    np.testing.assert_allclose(mean.detach().numpy(), values.mean((0, 2, 3)))
    np.testing.assert_allclose(variance.detach().numpy(), values.var((0, 2, 3)))
    assert torch.autograd.gradcheck(functional.channel_moments, (x,))
    with pytest.raises(ValueError, match="x must have the shape"):
        functional.channel_moments(torch.zeros(3))
