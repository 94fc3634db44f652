"""The EMAs of a run's weights: which it tracks, and which one is sampled from. Imports no jax."""

from typing import Literal, NamedTuple

from ml_collections import ConfigDict

# EDM's (Karras et al. 2022, their training loop).
EMA_RAMPUP_RATIO = 0.05
# The widest profile that rises is that with γ = 0, of σ_rel = 1/√12 = 0.289.
MIN_SIGMA_REL, MAX_SIGMA_REL = 0.001, 0.28

_SIGMA_REL = "sigma_rel="


class EmaChoice(NamedTuple):
    """The EMA that a field `ema` selects.

    Attributes:
      kind: "main", the run's EMA; "weights", the raw weights; "decay", an EMA of `train.ema_decays`;
        "sigma_rel", a power-function EMA.
      value: the decay or σ_rel.
    """

    kind: Literal["main", "weights", "decay", "sigma_rel"] = "main"
    value: float = 0.0

    @property
    def name(self) -> str:
        """As in the field `ema`: "", "weights", "0.999", "sigma_rel=0.1"."""
        names = {"main": "", "weights": "weights", "decay": decay_name(self.value)}
        return names.get(self.kind, sigma_rel_name(self.value))

    @property
    def words(self) -> str:
        """The weights in words, as in "EMA at step 1,000"."""
        if self.kind == "main":
            return "EMA"
        return "weights without EMA" if self.kind == "weights" else f"EMA {self.name}"


def decay_name(decay: float) -> str:
    """The name of an EMA with this decay, such as "0.999"."""
    return repr(float(decay))


def sigma_rel_name(sigma_rel: float) -> str:
    """The name of a power-function EMA of this relative width, such as "sigma_rel=0.1"."""
    return f"{_SIGMA_REL}{float(sigma_rel)!r}"


def parse_choice(text: str) -> EmaChoice:
    """The choice that a field `ema` names; ValueError for a text that is none."""
    if text in ("", "weights"):
        return EmaChoice("weights" if text else "main")
    try:
        value = float(text.removeprefix(_SIGMA_REL))
    except ValueError as error:
        raise ValueError(
            f"ema={text!r} is not valid; it must be empty, weights, a decay such as 0.999, or {_SIGMA_REL}0.1"
        ) from error
    if not text.startswith(_SIGMA_REL):
        return EmaChoice("decay", value)
    if not MIN_SIGMA_REL <= value <= MAX_SIGMA_REL:
        raise ValueError(f"ema={text!r} is out of range: sigma_rel must be from {MIN_SIGMA_REL} to {MAX_SIGMA_REL}")
    return EmaChoice("sigma_rel", value)


def check_choice(choice: EmaChoice, train: ConfigDict) -> None:
    """Raises a ValueError if a run with these fields of `train` has no such EMA."""
    if choice.kind == "sigma_rel" and not train.ema_sigma_rel:
        raise ValueError(
            f"ema={choice.name!r} needs power-function EMAs, which a run with config.train.ema_sigma_rel=() does not "
            "track; train one with --config.train.ema_sigma_rel=0.05,0.1"
        )
    # The run's own has a name too, where its decay is constant.
    decays = (*train.ema_decays, *(() if has_rampup(train) else (main_decay(train),)))
    if choice.kind == "decay" and choice.value not in decays:
        tracked = ["weights", *map(decay_name, decays), *([f"{_SIGMA_REL}0.1"] if train.ema_sigma_rel else [])]
        raise ValueError(
            f"ema={choice.name!r} is not an EMA of this run, whose config.train.ema_decays is {train.ema_decays}; "
            f"choose one of {', '.join(tracked)}, or leave it empty for the run's own EMA"
        )


def main_decay(train: ConfigDict) -> float:
    """The decay per step of the run's EMA after the ramp-up: `ema_decay`, or 0.5^(batch_size/ema_halflife_images)."""
    if not train.ema_halflife_images:
        return train.ema_decay
    return 0.5 ** (train.batch_size / train.ema_halflife_images)


def has_rampup(train: ConfigDict) -> bool:
    """Whether the EMA's half-life grows with the images seen."""
    return bool(train.ema_halflife_images and train.ema_rampup_ratio)


def extra_names(train: ConfigDict) -> list[str]:
    """The names of the EMAs beside the main one, as in `TrainState.ema_extra`."""
    return [*map(decay_name, train.ema_decays), *map(sigma_rel_name, train.ema_sigma_rel)]


def ema_summary(train: ConfigDict) -> str:
    """A run's EMAs in a few words, such as "EMA 0.9999 (also 0.999, sigma_rel=0.05)"."""
    if not train.ema_halflife_images:
        words = f"EMA {train.ema_decay:g}"
    else:
        ramp = f", ramp-up {train.ema_rampup_ratio:g}" if train.ema_rampup_ratio else ""
        words = f"EMA with a half-life of {train.ema_halflife_images:,.0f} images{ramp}"
    also = ", ".join(extra_names(train))
    return f"{words} (also {also})" if also else words
