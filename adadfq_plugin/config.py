"""Frozen, validated settings: each default of a run stands here once; CLI options and docs are made from it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adadfq_plugin.errors import SettingsError, UnknownNameError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "AdaDFQSettings",
    "GeneratorSettings",
    "Scheme",
    "Settings",
    "build",
    "from_toml",
    "scheme_of",
    "to_toml",
]

Bits = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Scheme(_Frozen):
    """How the network is quantized (the deployable protocol): WxAy is ``weight_bits``, ``activation_bits``."""

    weight_bits: Bits = Field(8, description="bits of the weights, symmetric per output channel")
    activation_bits: Bits = Field(8, description="bits of the activations, affine per tensor")
    boundary_bits: Bits = Field(8, description="bits of the network's input and of its logits")
    engine: Literal["auto", "x86", "fbgemm", "onednn", "qnnpack"] = Field(
        "auto", description="integer kernels to prepare for; auto takes the best of this machine"
    )


class Settings(_Frozen):
    """What every method has: how many samples, and how the quantized network Q learns from them."""

    samples: Positive | None = Field(
        None,
        description="synthetic images made before Q is trained and kept after it (AdaDFQ trains on up to twice "
        "as many); unset: 1024 up to 64 pixels (down to 256 where a time limit leaves no time to refine them), else "
        "128 up to 5 bits and 64 beyond",
    )
    batch_size: Positive | None = Field(
        None, description="images in a training step of Q; unset: 32 up to 64 pixels, else 8"
    )
    steps: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="training steps of Q, 0 sets ranges and rounds only; unset: from the bits and the network's cost",
    )
    optimizer: Literal["adam", "sgd"] = Field("adam", description="optimiser of Q")
    learning_rate: Rate | None = Field(
        None,
        description="initial learning rate of Q's weights, under adam in quantization steps of each channel; "
        "unset: 0.005 from 32 images a step, less from fewer (sgd needs a rate of its own)",
    )
    step_size_learning_rate: Rate | None = Field(
        None,
        description="learning rate of the step sizes, relative to each; unset: 5e-4 at 4 bits, half per bit more",
    )
    weight_decay: NonNegative = Field(0.0, description="weight decay of Q's weights")
    schedule: Literal["cosine", "stages"] = Field("cosine", description="decay of Q's learning rates")
    stages: tuple[Fraction, ...] = Field(
        (0.25, 0.5, 0.75), description="fractions of the run at which 'stages' divides the rates by ten"
    )
    loss: Literal["kl", "information"] = Field(
        "kl",
        description="what Q minimises: divergence from P, or the paper's negative disagreement information",
    )
    feature_weight: NonNegative | None = Field(
        None,
        description="weight of the activations' distance from P's beside Q's loss; unset: 10 up to 5 bits, else 0",
    )
    temperature: Rate = Field(4.0, description="temperature of Q's loss")
    mixup: Fraction = Field(
        0.5,
        description="share of Q's batches that are mixed in pairs, P's answers to the mixtures as targets",
    )
    ranges: Literal["mse", "minmax"] = Field("mse", description="start of the activation and weight ranges")
    range_samples: Positive = Field(
        256, description="images that the observers see, and the rounding (at most 64 beyond 64 pixels)"
    )
    rounding: Literal["compensated", "nearest"] = Field(
        "compensated",
        description="start of the weights: rounded one after the other, each error made up for by those that follow "
        "(GPTQ), or as they are",
    )
    steady_means: bool = Field(
        True,
        description="in training, biases take up what changes of the rounding do to the outputs' means",
    )
    learn_step_sizes: bool = Field(True, description="train the step sizes of weights and activations (LSQ)")
    keep_best: bool = Field(
        True,
        description="leave Q's best state on samples kept from its training if its last one is a fifth worse",
    )

    def model_post_init(self, _context: Any) -> None:
        if self.optimizer == "sgd" and self.learning_rate is None:
            raise ValueError("optimizer 'sgd' needs a learning_rate, in the weights' own units")


class GeneratorSettings(Settings):
    """Settings of the methods that train a generator against the teacher."""

    latent_dim: Positive = Field(128, description="length of the generator's latent vector")
    generator_width: Annotated[int, Field(ge=16)] = Field(
        128, description="channels of the generator's first stage, no fewer than of its last"
    )
    generator_learning_rate: Rate = Field(1e-3, description="learning rate of the generator (Adam)")
    generator_cooling: Fraction = Field(
        0.2,
        description="share of the generator's learning rate left at the end of its warm-up, and in the game",
    )
    generator_batch_size: Positive | None = Field(
        None,
        description="images in a step of the generator; unset: 64 up to 64 pixels, else 9, and no more than a "
        "batch_size that is set; without replay Q's steps have as many",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="steps of the generator before Q joins; unset: from the bits and the network's cost"
    )
    refine_steps: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="steps on each kept batch of images, by the priors' loss and the labels'; unset: from the bits, "
        "half as many without BatchNorm",
    )
    refine_rate: Rate = Field(
        0.025, description="learning rate of kept images (Adam), as a share of the range of valid pixels"
    )
    natural: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="share of noise with the spectrum of photographs in G's images; unset: 0.95 where no BatchNorm "
        "tells their statistics, else 0",
    )
    gamma: NonNegative = Field(10.0, description="weight of the BatchNorm-statistics loss")
    bn_units: Literal["relative", "absolute"] = Field(
        "relative", description="statistics in units of each channel's running deviation, or as in the paper"
    )
    patch_similarity: NonNegative = Field(
        0.0, description="weight of the entropy of the patches' similarities (PSAQ-ViT)"
    )
    head_similarity: NonNegative = Field(
        0.0, description="weight of the similarity of what the heads of an attention look at (MimiQ)"
    )
    tv: NonNegative = Field(0.0, description="weight of the total variation of the images")
    image_norm: NonNegative = Field(0.0, description="weight of the mean squared pixel of the images")


class AdaDFQSettings(GeneratorSettings):
    """Settings of AdaDFQ; the symbols are the paper's (Qian et al., CVPR 2023, section 3)."""

    alpha_ds: NonNegative = Field(0.2, description="weight of the disagreement samples' loss")
    alpha_as: NonNegative = Field(0.1, description="weight of the agreement samples' loss")
    beta: NonNegative = Field(1.0, description="weight of the balance loss")
    lambda_l: Fraction = Field(0.1, description="lower boundary of the normalised information")
    lambda_u: Fraction = Field(0.8, description="upper boundary of the normalised information")
    generator_interval: Positive = Field(
        50,
        description="steps of Q for each step of the generator; beside a pool it has none in the last 30 % of a "
        "cosine",
    )
    replay: bool = Field(True, description="Q learns from a pool of kept samples, not from the newest alone")

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.lambda_l >= self.lambda_u:
            raise ValueError(f"lambda_l ({self.lambda_l}) must lie below lambda_u ({self.lambda_u})")
        sizes = {self.batch_size, self.generator_batch_size} - {None}
        if not self.replay and len(sizes) > 1:
            raise ValueError(
                f"without replay Q learns from G's batches: batch_size ({self.batch_size}) and generator_batch_size "
                f"({self.generator_batch_size}) must be the same"
            )


ModelT = TypeVar("ModelT", bound=BaseModel)


def nearest(name: str, names: list[str] | tuple[str, ...]) -> str:
    """``, did you mean 'x'?`` for the nearest of ``names``, or nothing.

    Example:
        >>> nearest("gama", ["gamma", "beta"])
        ", did you mean 'gamma'?"
    """
    close = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def build(kind: type[ModelT], values: Mapping[str, Any], owner: str = "") -> ModelT:
    """Validated settings from plain values.

    Args:
        kind: the settings class.
        values: field names to values; those absent keep their defaults.
        owner: whose settings they are, in messages; unset: the class.

    Raises:
        UnknownNameError: a name that ``kind`` has no field for, with the nearest one.
        SettingsError: a value out of bounds or values that contradict each other.

    Example:
        >>> build(Scheme, {"weight_bits": 4}).weight_bits
        4
    """
    fields = list(kind.model_fields)
    for name in values:
        if name not in fields:
            raise UnknownNameError(
                f"{owner or kind.__name__} has no setting {name!r}{nearest(name, fields)} "
                f"(it has: {', '.join(fields)})"
            )
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        culprit = f"setting {where} = {first['input']!r}: " if where else ""
        raise SettingsError(f"{culprit}{first['msg'].removeprefix('Value error, ')}") from None


def scheme_of(scheme: Scheme | Mapping[str, Any] | None) -> Scheme:
    """A scheme from plain values.

    Raises:
        SettingsError: neither a scheme nor widths by name, or widths that can't be.
    """
    if not isinstance(scheme, Scheme | Mapping | None):
        raise SettingsError(f"scheme = {scheme!r} is no Scheme, nor widths by name: {{'weight_bits': 4}}")
    return scheme if isinstance(scheme, Scheme) else build(Scheme, scheme or {})


def to_toml(sections: Mapping[str, BaseModel | Mapping[str, Any]]) -> str:
    """TOML text, one table a section; unset values are left out.

    Example:
        >>> print(to_toml({"scheme": Scheme(weight_bits=4)}).splitlines()[1])
        weight_bits = 4
    """
    tables = {
        name: _without_none(section.model_dump(mode="json") if isinstance(section, BaseModel) else section)
        for name, section in sections.items()
    }
    return tomli_w.dumps(tables)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }


def from_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, as plain values.

    Raises:
        SettingsError: the file can't be read or isn't TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"settings file {str(path)!r}: {error}") from error
