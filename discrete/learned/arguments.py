"""Arguments of problems and families, checked at entry by their names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ode_stopping.core.validation import checked_number, described, require_count

__all__ = [
    "check_counts",
    "check_minibatch",
    "check_shares",
    "check_targets",
    "check_weights",
    "require_floats",
]


def require_floats(value: object, axes: tuple[str, ...], *, name: str) -> None:
    """Raise unless it is a floating-point tensor with these axes, none of them empty."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {described(value)}")
    if value.ndim != len(axes) or 0 in value.shape:
        shape = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")


def check_minibatch(minibatch: object, rows: int) -> None:
    """Raise unless it is None or a number of rows that there are.

    Raises:
        TypeError, ValueError: Naming the argument.
    """
    if minibatch is None:
        return
    require_count(minibatch, name="minibatch")
    assert isinstance(minibatch, int)
    if minibatch > rows:
        raise ValueError(f"minibatch must be at most the number of rows, {rows}; got {minibatch}")


def check_counts(**counts: object) -> None:
    """Raise unless they are positive integers."""
    for name, value in counts.items():
        require_count(value, name=name)


def check_weights(**weights: object) -> None:
    """Raise unless they are finite numbers >= 0."""
    for name, value in weights.items():
        checked_number(value, name=name, low=0.0, closed=True)


def check_shares(**shares: object) -> None:
    """Raise unless they are numbers from 0 to 1."""
    for name, value in shares.items():
        if checked_number(value, name=name, low=0.0, closed=True) > 1:
            raise ValueError(f"{name} must be a share, from 0 to 1; got {value}")


def check_targets(targets: object) -> None:
    """Raise unless they are positive numbers, at least one."""
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list of numbers; got {described(targets)}")
    if not targets:
        raise ValueError("targets must hold at least one number; got none")
    for place, value in enumerate(targets):
        checked_number(value, name=f"targets[{place}]", low=0.0)
