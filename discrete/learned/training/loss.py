"""The loss of meta-training, sum_k w_k f(x_k) + lambda N_J, and its cotangents on the iterates.

(Eq. 10 of arXiv 2505.22509.) Of a run all that is needed is f, J and their gradients at the
iterates: what the loss makes of x_k is a cotangent on x_k, and the rest is the optimiser's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ode_stopping.core.validation import checked_number
from ode_stopping.criteria import GradientNorm, LossValue

from ..tasks import MetaTask

__all__ = ["Measured", "MetaLoss", "Outcomes", "cotangents", "measure"]


@dataclass(frozen=True)
class MetaLoss:
    """Mean over the problems of sum_{k=1..K} w_k f(x_k) + lambda N, or of sum w_k log f(x_k).

    N is the mean index over the targets of the task. A miss counts K + 1 and has no gradient.

    Args:
        stopping: lambda >= 0, by which N counts.
        values: "f", or "log": the logarithm, which weighs every decade alike; "none": N alone.
        weights: w_1 .. w_K; None: 1/K each.
        interpolation: None: Definition 3; "log": the fractional index, for J > 0.
        largest: Bound on the norm of the cotangent of each hit, relative to lambda; None: none.
            (Where J hardly falls the quotient is large.)

    Raises:
        TypeError: No number where there should be one.
        ValueError: A negative or infinite lambda or weight, a bound that is not positive, or an
            unknown word.
    """

    stopping: float = 1.0
    values: Literal["f", "log", "none"] = "f"
    weights: Sequence[float] | None = None
    interpolation: Literal["log"] | None = None
    largest: float | None = None

    def __post_init__(self) -> None:
        checked_number(self.stopping, name="stopping", low=0.0, closed=True)
        for place, weight in enumerate(() if self.weights is None else self.weights):
            checked_number(weight, name=f"weights[{place}]", low=0.0, closed=True)
        if self.largest is not None:
            checked_number(self.largest, name="largest", low=0.0)
        if self.values not in ("f", "log", "none"):
            raise ValueError(f'values must be "f", "log" or "none"; got {self.values!r}')
        if self.interpolation not in (None, "log"):
            raise ValueError(f'interpolation must be None or "log"; got {self.interpolation!r}')

    def weight(self, k: int, horizon: int) -> float:
        """w_k."""
        if self.values == "none":
            return 0.0
        if self.weights is None:
            return 1.0 / horizon
        return self.weights[k - 1] if k <= len(self.weights) else 0.0

    def of_values(self, f: Tensor) -> Tensor:
        """What counts of f."""
        return f.clamp_min(_TINY).log() if self.values == "log" else f

    def slope(self, f: Tensor) -> Tensor:
        """Its derivative to f."""
        return 1.0 / f.clamp_min(_TINY) if self.values == "log" else torch.ones_like(f)


_TINY = 1e-30


@dataclass(frozen=True)
class Measured:
    """A stretch of a run of b problems, x_a to x_{a+S}.

    Attributes:
        begin: a.
        x: Shape (S + 1, b, d).
        f: Shape (S + 1, b).
        gradients: Of f, shape (S + 1, b, d).
        criterion: J, shape (S + 1, b); infinite where there is none (a decrease at x_0).
    """

    begin: int
    x: Tensor
    f: Tensor
    gradients: Tensor
    criterion: Tensor


@dataclass(frozen=True)
class Outcomes:
    """What is known of b problems with K targets each, at some step.

    Attributes:
        index: N, integers, shape (b, K); -1 where a target was not met yet.
        at_index: f(x_N), shape (b, K); NaN there.
        rises: Whether f rose in the step to N, shape (b, K).
        lowest: Smallest f so far, shape (b,).
        worst: Largest f over the smallest before it, shape (b,).
        finite: Whether f was finite so far, shape (b,).
    """

    index: Tensor
    at_index: Tensor
    rises: Tensor
    lowest: Tensor
    worst: Tensor
    finite: Tensor

    @classmethod
    def at_start(cls, f: Tensor, criterion: Tensor, targets: Tensor) -> Outcomes:
        """At x_0; a target that is met there has N = 0."""
        met = criterion.unsqueeze(-1) <= targets.to(criterion)
        missing = torch.full(met.shape, float("nan"), dtype=f.dtype, device=f.device)
        return cls(
            torch.where(met, 0, -1),
            torch.where(met, f.unsqueeze(-1), missing),
            torch.zeros_like(met),
            f.clone(),
            torch.ones_like(f),
            f.isfinite(),
        )

    def after(self, part: Measured, targets: Tensor) -> tuple[Outcomes, Tensor]:
        """After a stretch; and at which of its steps each target was met, (b, K), 0 for none."""
        steps, count = part.criterion[1:], targets.to(part.criterion)
        met = steps.unsqueeze(-1) <= count
        fresh = met.any(0) & (self.index < 0) & self.finite.unsqueeze(-1)
        place = torch.where(fresh, met.to(torch.int8).argmax(0) + 1, 0)
        problems = torch.arange(len(place), device=place.device).unsqueeze(-1).expand(place.shape)
        at_index = part.f[place, problems]
        risen = at_index > part.f[(place - 1).clamp_min(0), problems]
        lowest = torch.cat([self.lowest.unsqueeze(0), part.f[1:]]).cummin(0).values
        ratios = part.f[1:] / lowest[:-1].clamp_min(_TINY)
        found = Outcomes(
            torch.where(fresh, part.begin + place, self.index),
            torch.where(fresh, at_index, self.at_index),
            torch.where(fresh, risen, self.rises),
            lowest[-1],
            torch.maximum(self.worst, ratios.nan_to_num(float("inf")).amax(0)),
            self.finite & part.f.isfinite().all(0) & part.x.isfinite().all(-1).all(0),
        )
        return found, place

    def blown(self, factor: float = 10.0) -> Tensor:
        """Whose f was above so many times its lowest before it, or not finite, shape (b,)."""
        return (self.worst > factor) | ~self.finite

    def counted(self, horizon: int) -> Tensor:
        """N with a miss as horizon + 1, shape (b, K)."""
        return torch.where(self.index < 0, horizon + 1, self.index)


def measure(
    task: MetaTask, k: int, x: Tensor, f: Tensor, gradient: Tensor, before: Tensor | None
) -> Tensor:
    """J(x_k), shape (b,), from what is known there already where that is enough.

    Args:
        task: The problems.
        k: The step.
        x: x_k, shape (b, d).
        f: f(x_k), shape (b,).
        gradient: grad f(x_k), shape (b, d).
        before: f(x_{k-1}); None at k = 0.
    """
    criterion = task.measured
    if criterion == "decrease":
        return torch.full_like(f, float("inf")) if before is None else before - f
    if _is_of(criterion, task, LossValue):
        return f
    if _is_of(criterion, task, GradientNorm) and criterion.ord == 2:
        norm = torch.linalg.vector_norm(gradient, dim=-1)
        return norm.square() if criterion.squared else norm
    with torch.no_grad():
        return criterion(torch.as_tensor(float(k), dtype=x.dtype, device=x.device), x)


def _is_of(criterion: Any, task: MetaTask, kind: type) -> bool:
    return type(criterion) is kind and getattr(criterion, "objective", None) is task.objective


def cotangents(
    task: MetaTask, loss: MetaLoss, part: Measured, places: Tensor, *, horizon: int, share: float
) -> tuple[Tensor, Tensor]:
    """The value of a stretch without N, and the cotangents on x_a .. x_{a+S}, (S + 1, b, d).

    Args:
        task: The problems.
        loss: The loss.
        part: The stretch.
        places: At which of its steps each target was met, shape (b, K); 0 for none.
        horizon: K.
        share: Of each problem in the loss: one over their number.

    Returns:
        The sum of share w_k f(x_k) over the steps and problems, shape (); and the cotangents.

    Raises:
        ValueError: A fractional index by logarithms, of a criterion or target that may be negative.
    """
    if loss.interpolation == "log" and (
        task.measured == "decrease" or bool((task.targets <= 0).any())
    ):
        raise ValueError(
            'interpolation="log" needs a criterion and targets > 0; got '
            f"{task.criterion!r} and targets {task.targets.tolist()}. Take interpolation=None"
        )
    steps = range(1, len(part.f))
    weights = part.f.new_tensor([loss.weight(part.begin + i, horizon) for i in steps]) * share
    value = (weights.unsqueeze(-1) * loss.of_values(part.f[1:])).sum()
    found = torch.zeros_like(part.x)
    slopes = weights.unsqueeze(-1) * loss.slope(part.f[1:])
    found[1:] = slopes.unsqueeze(-1) * part.gradients[1:]
    count = places.shape[1]
    if loss.stopping and bool(places.any()):
        for target, column in zip(task.targets.tolist(), places.unbind(1), strict=True):
            if bool(column.any()):
                _add_hit(found, task, loss, part, column, target, loss.stopping * share / count)
    return value, found


def _add_hit(
    found: Tensor,
    task: MetaTask,
    loss: MetaLoss,
    part: Measured,
    place: Tensor,
    target: float,
    scale: float,
) -> None:
    """Add the cotangents of one target's index, at the problems that met it in this stretch."""
    problems = torch.arange(len(place), device=place.device)
    here, before = place, (place - 1).clamp_min(0)
    now, then = part.criterion[here, problems], part.criterion[before, problems]
    usable = (place > 0) & then.isfinite() & now.isfinite()

    def add(at: Tensor, factor: Tensor, slopes: Tensor) -> None:
        """To x at some steps, a number a problem times a vector each."""
        factor = torch.where(usable, scale * factor, torch.zeros_like(factor))
        parts = factor.unsqueeze(-1) * slopes
        if loss.largest is not None:
            norms = torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
            parts = parts * (loss.largest * scale / norms.clamp_min(_TINY)).clamp_max(1.0)
        found[at, problems] += parts

    if task.measured == "decrease":
        # J_N - J_(N-1), of differences of f: x_(N-1) is in both. (After a rise J comes from below.)
        usable = usable & (then != now)
        add(here, 1.0 / (now - then), part.gradients[here, problems])
        add(before, -1.0 / (now - then), part.gradients[before, problems])
    elif loss.interpolation is None:
        usable = usable & (then > now)
        add(here, 1.0 / (then - now), _slope(task, part, here, problems))
    else:
        # N* = N - 1 + (p - e)/(p - q), of the logarithms of J_(N-1), the target and J_N.
        usable = usable & (then > now) & (now > 0)
        p, q, e = then.log(), now.log(), torch.full_like(now, target).log()
        square = (p - q).square()
        add(here, (p - e) / square / now, _slope(task, part, here, problems))
        add(before, (e - q) / square / then, _slope(task, part, before, problems))


def _slope(task: MetaTask, part: Measured, place: Tensor, problems: Tensor) -> Tensor:
    """grad J at one iterate of each problem, shape (b, d)."""
    x = part.x[place, problems].detach().requires_grad_(True)
    with torch.enable_grad():
        value = task.measured(torch.zeros((), dtype=x.dtype, device=x.device), x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient
