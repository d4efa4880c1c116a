"""Hyperparameters as the adaptation sees them: where they stand in a group, and their logarithm.

The printed Algorithm 2 takes gradient steps in alpha itself, whose unit is that of x. The guarded
form takes them in a coordinate u without unit,

    learning rate, weight decay:  u = log theta,         d theta/du = theta
    beta, momentum:               u = -log(1 - theta),   d theta/du = 1 - theta

(1/(1 - beta) is the memory in steps), so that no step can leave the admissible range, and rescaling
f or x changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, isinf, log
from typing import Any

__all__ = ["ANCHOR", "BETA1", "BETA2", "LEARNING_RATE", "MOMENTUM", "WEIGHT_DECAY", "Coordinate"]

# Where a group keeps the values that it was given, which the bounds are relative to.
ANCHOR = "adapted_from"


@dataclass(frozen=True)
class Coordinate:
    """One hyperparameter of a parameter group.

    Attributes:
        name: What it is called here.
        key: Its key in the group.
        place: Its place where the value under the key is a tuple (betas); else None.
        memory: Whether u = -log(1 - theta) instead of log theta.
        reach: By which factor theta (or 1 - theta) may leave its first value, up and down.
    """

    name: str
    key: str
    place: int | None = None
    memory: bool = False
    reach: float = 1e6

    def read(self, group: Mapping[str, Any]) -> float:
        """The value in a group."""
        value = group[self.key]
        return float(value if self.place is None else value[self.place])

    def write(self, group: dict[str, Any], value: float) -> None:
        """Put a value into a group."""
        if self.place is None:
            group[self.key] = value
        else:
            values = list(group[self.key])
            values[self.place] = value
            group[self.key] = tuple(values)

    def slope(self, value: float) -> float:
        """d theta/du."""
        return 1.0 - value if self.memory else value

    def moved(self, group: Mapping[str, Any], change: float) -> float:
        """The value after u -> u + change, within the bounds around the group's first value."""
        value, first = self.read(group), group[ANCHOR][self.name]
        if self.memory:
            # Of 1 - theta, which is at most 1: a negative beta is none.
            high = min(1.0, (1.0 - first) * self.reach)
            low = (1.0 - first) / self.reach
            return 1.0 - _scaled(1.0 - value, -change, low, high)
        return _scaled(value, change, first / self.reach, first * self.reach)

    def require_admissible(self, group: Mapping[str, Any]) -> None:
        """Raise where there is no coordinate: a rate or weight decay of 0 has no logarithm.

        Raises:
            ValueError: Naming the hyperparameter and its value.
        """
        value = self.read(group)
        if self.memory:
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{self.name} must be in [0, 1) to be adapted; got {value:g}")
        elif not value > 0.0 or isinf(value):
            raise ValueError(
                f"{self.name} must be positive to be adapted (its steps are relative, and 0 stays "
                f"0); got {value:g}"
            )


def _scaled(value: float, change: float, low: float, high: float) -> float:
    """Value * exp(change), kept between the bounds; a value outside (a scheduler's) may stay."""
    if value <= 0.0:
        return value
    low, high = min(low, value), max(high, value)
    if change >= log(high / value):  # of any size where signals are not clipped; exp(710) is none
        return high
    return min(max(value * exp(change), low), high)


LEARNING_RATE = Coordinate("lr", "lr")
WEIGHT_DECAY = Coordinate("weight_decay", "weight_decay")
MOMENTUM = Coordinate("momentum", "momentum", memory=True, reach=10.0)
BETA1 = Coordinate("beta1", "betas", place=0, memory=True, reach=10.0)
BETA2 = Coordinate("beta2", "betas", place=1, memory=True, reach=10.0)
