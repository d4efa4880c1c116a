"""All settings of an online adaptation, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf, isfinite
from typing import Any, Literal

from .coordinates import Coordinate
from .rules import GuardedRule, PaperRule

__all__ = ["AdaptationOptions", "names", "of_variant"]

Variant = Literal["guarded", "paper"]


@dataclass(frozen=True)
class AdaptationOptions:
    """Settings that hold for all parameter groups.

    Attributes:
        adapt: The hyperparameters that are adapted, by name.
        variant: "guarded", or "paper" for Algorithm 2 as printed.
        descent_threshold: The decrease that an update takes, in units of f. "paper": eps_desc,
            which is multiplied by the number of updates so far and compared with f_ref - f.
        horizon: K, through how many steps the sensitivity goes back.
        every: Only every so many steps are looked at, and taken back if they blew up; the others
            cost what they cost without adaptation (but for gradients that are differentiable where
            the horizon is above 1).
        deterministic: The closure gives the same loss and gradients at the same point (no
            minibatches, no dropout): the evaluation after a step serves the next one. It is asked
            twice now and then, and an error raised if it is not so.
        held_out: On fresh batches, leave the present gradient's own part out of the signal.
        max_signal, caution, settle: See `GuardedRule`.
        max_rise: A step is taken back, and the rate divided by 10, where f is not finite or rose by
            more than max_rise * lr |grad f(x_k)| |d_k| (with |d_k| in the place of the gradient's
            where that is larger and of the same unit, as in SGD). Steps that are multiples of the
            gradient grow like a power when the rate is too large, faster than it can follow;
            Adam's do not.
        max_grad_norm: Gradients are scaled down to this length (over all parameters) for the step,
            and used as they are for the signal. Clipping in the closure would scale the signal as
            well, against a change of f that it does not scale.
        record_every: Of the history, in steps; 0 keeps none.
    """

    adapt: tuple[str, ...] = ("lr",)
    variant: Variant = "guarded"
    descent_threshold: float = 0.0
    horizon: int = 1
    every: int = 1
    deterministic: bool = False
    held_out: bool = True
    max_signal: float = 0.5
    caution: float = 1.0 / 3.0
    settle: float = 25.0
    max_rise: float = inf
    max_grad_norm: float = inf
    record_every: int = 1

    def __post_init__(self) -> None:
        if self.variant not in ("guarded", "paper"):
            raise ValueError(f'variant must be "guarded" or "paper"; got {self.variant!r}')
        for name, least in (("horizon", 1), ("every", 1), ("record_every", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer, at least {least}; got {value!r}")
        for name in ("deterministic", "held_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if not (self.descent_threshold >= 0 and isfinite(self.descent_threshold)):
            raise ValueError(
                f"descent_threshold must be finite and not negative; got {self.descent_threshold}"
            )
        if not self.max_signal > 0:
            raise ValueError(f"max_signal must be positive; got {self.max_signal}")
        if not 0 <= self.caution <= 1:
            raise ValueError(f"caution must be between 0 and 1; got {self.caution}")
        if not self.max_rise > 1:
            raise ValueError(f"max_rise must be greater than 1; got {self.max_rise}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive; got {self.max_grad_norm}")
        if self.max_grad_norm < inf and self.horizon > 1:
            raise ValueError(
                "max_grad_norm with horizon > 1: the derivative through several steps does not "
                "know of the clipping. Use horizon=1"
            )
        if not self.settle > 0:
            raise ValueError(f"settle must be positive; got {self.settle}")
        if self.variant == "paper" and tuple(self.adapt) != ("lr",):
            raise ValueError(
                f"Algorithm 2 as printed adapts the learning rate alone; got adapt={self.adapt}"
            )

    @classmethod
    def of(cls, optimizer: str, **values: Any) -> AdaptationOptions:
        """Options by name, with an error that names the optimiser.

        Raises:
            TypeError: There is no such option.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise TypeError(
                f"{optimizer} has no option {unknown[0]!r}; besides its own it has {known}"
            )
        return cls(**values)

    @property
    def guarded(self) -> bool:
        """Whether the guards are on."""
        return self.variant == "guarded"

    def rule(self) -> PaperRule | GuardedRule:
        """A new rule with these settings."""
        if self.guarded:
            return GuardedRule(self.descent_threshold, self.max_signal, self.caution, self.settle)
        return PaperRule(self.descent_threshold)

    def chosen(self, coordinates: Sequence[Coordinate], name: str) -> tuple[Coordinate, ...]:
        """The coordinates that are adapted, in the order of an optimiser's own.

        Raises:
            ValueError: It is empty, or names something that the optimiser does not have.
        """
        known = [coordinate.name for coordinate in coordinates]
        unknown = [wanted for wanted in self.adapt if wanted not in known]
        if unknown or not self.adapt:
            raise ValueError(f"adapt: {name} can adapt {known}; got {list(self.adapt)}")
        return tuple(c for c in coordinates if c.name in self.adapt)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a state_dict."""
        return {**asdict(self), "adapt": list(self.adapt)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaptationOptions:
        """What `to_dict` gave."""
        return cls(**{**values, "adapt": tuple(values["adapt"])})


def names(adapt: Sequence[str]) -> tuple[str, ...]:
    """A tuple of names.

    Raises:
        TypeError: One string, whose letters would be the names.
    """
    if isinstance(adapt, str):
        raise TypeError(f"adapt must be a tuple of names, as in ({adapt!r},); got a string")
    return tuple(adapt)


def of_variant(
    variant: Variant, adapt_rate: float | None, descent_threshold: float | None
) -> tuple[float, float]:
    """Both, or what they are by default: 0.25 and 0; in the printed form the paper's for a1a."""
    rate, threshold = (1e-2, 1e-5) if variant == "paper" else (0.25, 0.0)
    return (
        rate if adapt_rate is None else adapt_rate,
        threshold if descent_threshold is None else descent_threshold,
    )
