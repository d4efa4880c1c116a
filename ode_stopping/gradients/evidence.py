"""What speaks for a gradient: figures for its error, and a warning where they are large.

A gradient of a stopping time can be wrong while T is right to ten digits, so every backward pass
leaves figures on the result. They come from what the solves know anyway:

- `identity`: lam(t)^T F(t, x(t)) changes by the integral of lam^T F_t (at t0 these are the two
  forms of dT/dt0, theory section 1; in autonomous problems lam^T F = -1). The residual, looked at
  in every step, sees the error of lam along F, and jumps of the flow that nobody named.
- `quadrature`: the embedded formula of the backward method is a second quadrature of every
  parameter integral, and its steps are added up with their signs.
- `time_error`: the error estimates of the forward steps, each weighed by lam where it was made, add
  up to the error of T that they caused.
- `clock`: one rounding of T, relative to T - t0.
- `noise` and `rounding`: by how much lam(T) = -grad J / J' changes if x_T errs, on the level set of
  J, by the estimate of the last steps, or by one rounding of its elements.

The largest of them (the error of T relative to T - t0) is the estimate. It is compared with the
promise: 50 rtol, and never more than 10 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..core.status import GradientAccuracyWarning
from ..core.warn import warn_user
from ..crossing.near_miss import NearMiss
from ..crossing.watch import Hit
from ..solving.solver import Tolerances
from .refinement import LeafError

__all__ = [
    "Evidence",
    "identity_residual",
    "relative_size",
    "warn_about_grazing",
]

# A turn of J this close to the target, relative to how far J went back, is worth a word.
_GRAZING_MARGIN = 1e-2

# Below this, J'(T) is mostly cancellation, and that is the reason to name.
_GRAZING_RATE = 1e-2


@dataclass(frozen=True)
class Evidence:
    """Figures for the error of a gradient, all relative unless a unit is given.

    The figures of the backward pass are those of the latest one, and None before there was one.

    Attributes:
        rtol: Tolerance of the forward run.
        dtype: Dtype of the state.
        rate: J'(T).
        rate_scale: sum_i |g_i F_i| + |J_t|: J'(T) without its cancellation.
        near_miss: The dip of J before T that came closest to the target, or None.
        velocity_error: Largest relative error of the velocity in the accepted steps that were
            looked at (see `control`); part of no estimate.
        identity: Residual of the identity, relative to its largest term.
        quadrature: Largest relative difference of the two quadratures, over the parameters.
        time_error: Estimate of the error of T, in flow time; None where no path was kept.
        time_term: The same relative to T - t0.
        noise: Relative change of lam(T) under the error estimate of the last steps.
        rounding: The same under one rounding of every element of x_T, and where J is flat under one
            of J; or that of J', where the gradient to the target is asked for.
        clock: One rounding of T (or of the t that the flow sees), relative to T - t0.
        leaves: Of every tensor that was differentiated to, its estimated error (`LeafError`);
            empty with evidence="light", and for routes that keep no steps.
        second_route: For routes that are checked by another one: the largest relative difference.
    """

    rtol: float
    dtype: torch.dtype
    rate: float
    rate_scale: float
    near_miss: NearMiss | None = None
    velocity_error: float = 0.0
    identity: float | None = None
    quadrature: float | None = None
    time_error: float | None = None
    time_term: float | None = None
    noise: float | None = None
    rounding: float | None = None
    clock: float | None = None
    leaves: tuple[LeafError, ...] = ()
    second_route: float | None = None

    @classmethod
    def of(cls, call: Call, hit: Hit, velocity_error: float = 0.0) -> Evidence:
        """What is known of a hit before any gradient was taken."""
        assert hit.point is not None
        return cls(
            rtol=call.tolerances.rtol,
            dtype=call.x0.dtype,
            rate=hit.watch.criterion.shown(hit.point.rate),
            rate_scale=hit.point.rate_scale,
            near_miss=hit.near_miss,
            velocity_error=velocity_error,
        )

    @property
    def promise(self) -> float:
        """The relative error up to which nothing is said: 50 rtol, at most 0.1."""
        return Tolerances(self.rtol).promise(self.dtype)

    @property
    def figures(self) -> dict[str, float]:
        """The figures that the estimate is made of, as far as they are known."""
        names = ["identity", "rounding", "clock", "second_route", "refinement"]
        if not self.leaves:
            names += ["quadrature", "time_term", "noise"]
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def worst(self) -> LeafError | None:
        """The tensor whose gradient has the largest error."""
        return max(self.leaves, key=lambda leaf: leaf.error, default=None)

    @property
    def refinement(self) -> float | None:
        """The largest error of a leaf; None where they are not known one by one."""
        return None if self.worst is None else self.worst.error

    @property
    def estimate(self) -> float | None:
        """Estimated relative error of the gradient: the largest figure; None before a backward."""
        figures = self.figures
        if not figures:
            return None
        return max(value if value == value else float("inf") for value in figures.values())

    @property
    def passed(self) -> bool | None:
        """Whether the estimate keeps the promise; None before a backward pass."""
        return None if self.estimate is None else self.estimate <= self.promise

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and None only."""
        found: dict[str, Any] = {"rtol": self.rtol, "rate": self.rate}
        found |= {"rate_scale": self.rate_scale, "velocity_error": self.velocity_error}
        if self.near_miss is not None:
            found["near_miss"] = dict(vars(self.near_miss))
        found |= {"time_error": self.time_error, **self.figures}
        if self.leaves:
            found["leaves"] = {leaf.name: leaf.error for leaf in self.leaves}
        return found | {"estimate": self.estimate, "promise": self.promise}

    def __repr__(self) -> str:
        if self.estimate is None:
            return f"Evidence(no gradient yet; promise {self.promise:.1e})"
        worst = max(self.figures, key=self.figures.__getitem__)
        if worst == "refinement" and self.worst is not None:
            worst = self.worst.name
        lines = [f"Evidence(estimate {self.estimate:.1e} ({worst}), promise {self.promise:.1e})"]
        lines += [f"  {leaf.name}: {leaf.error:.1e}" for leaf in self.leaves]
        return "\n".join(lines)

    def warn(self) -> None:
        """Warn where the estimate exceeds the promise, with the reason and the remedy."""
        estimate = self.estimate
        if estimate is None or estimate <= self.promise:
            return
        warn_user(
            f"the gradient of this stopping time may be wrong by about {estimate:.1e} (relative; "
            f"rtol = {self.rtol:.0e} promises {self.promise:.0e}): {self._reason()}",
            GradientAccuracyWarning,
        )

    def _reason(self) -> str:
        """Why, and what to do: the first of the possible reasons that is large enough by itself."""
        tighter = f"solver=Torchdiffeq(rtol={max(self.rtol * 0.1, 1e-13):.0e})"
        large = {name for name, value in self.figures.items() if not value <= self.promise}
        lost = [leaf.name for leaf in self.leaves if leaf.cause == "lost"]
        if lost:
            return (
                f"moving {', '.join(lost)} a little changes the result by something else than the "
                "derivatives of flow and criterion say. One of them is lost or wrong somewhere on "
                "the path: a .detach(), .item() or torch.no_grad() on a branch, a hook, a "
                "torch.autograd.Function."
            )
        if self.worst is not None and "refinement" in large and self.worst.cause == "jump":
            return (
                f"the flow jumps in the state (a kink of the objective, a threshold, a contact), "
                f"and the jump of lam there, which changes that of {self.worst.name} by "
                f"{self.worst.error:.1e}, is missing: no setting mends it. Smooth the flow, or, "
                "where the time of the jump is known, name it in breakpoints=."
            )
        if abs(self.rate) < _GRAZING_RATE * self.rate_scale and large != {"identity"}:
            return (
                f"the crossing is nearly grazing (J'(T) = {self.rate:.2e} against a scale of "
                f"{self.rate_scale:.2e}), so every error is divided by a small number. Move the "
                f"target, or use {tighter}."
            )
        if "rounding" in large:
            remedy = (
                "Use float64" if self.dtype != torch.float64 else "Use a target that is met earlier"
            )
            return (
                f"one rounding of x_T or of J in {self.dtype} changes grad J / J' or J' by "
                f"{self.rounding:.1e}. {remedy}."
            )
        if "noise" in large:
            return (
                "the flow is stiff and the tolerance loose: the error of the last steps changes "
                f"grad J / J' by {self.noise:.1e}. Use {tighter}."
            )
        if "clock" in large:
            return (
                "T - t0 is so small against T that the clock cannot tell it: let time start near "
                "0, or use float64."
            )
        if "identity" in large:
            return (
                "lam^T F is not what it has to be along the path. Either the tolerance is too "
                f"loose (try {tighter}), or the flow jumps: in time (name the times in "
                "breakpoints=) or in the state (a kink of the objective: then the jump of lam is "
                "missing, and no setting mends it)."
            )
        if "second_route" in large:
            return (
                "this route and InterpolatingAdjoint, against which it is held, do not agree. A "
                "route that differentiates the steps (DirectAdjoint) differs where they are not "
                f"the flow: use InterpolatingAdjoint, or {tighter}. A route of your own is wrong."
            )
        if self.worst is not None and "refinement" in large:
            return (
                f"that of {self.worst.name} changes by {self.worst.error:.1e} on finer steps: the "
                f"tolerance is too loose for it. Use {tighter}."
            )
        return f"the tolerance is too loose for this flow. Use {tighter}."


def relative_size(gap: float, size: float) -> float:
    """gap / size; 0 where the gap is zero, infinite where only the size is or the gap is NaN."""
    if gap == 0.0:
        return 0.0
    return gap / size if size > 0 and isfinite(gap) else float("inf")


def identity_residual(
    at_start: Tensor, at_end: float, integral: float, received: float = 0.0
) -> float:
    """|lam(t0)^T F(t0) + int lam^T F_t - lam(T)^T F(T)|, relative to its terms.

    Args:
        at_start: lam_i F_i at t0, shape (n,).
        at_end: lam(T)^T F(T).
        integral: int lam^T F_t dt.
        received: Sum of |lam_i F_i| of what lam receives at the hits, which may cancel.
    """
    residual = abs(float(at_start.sum()) + integral - at_end)
    size = max(float(at_start.abs().sum()), abs(at_end), received) + abs(integral)
    return relative_size(residual, size)


def warn_about_grazing(near_miss: NearMiss | None, tolerances: Tolerances) -> None:
    """Warn where J nearly reached the target before T: T jumps under a small change."""
    if near_miss is None or not near_miss.rebound > 0:
        return
    relative = near_miss.margin / near_miss.rebound
    if relative >= max(_GRAZING_MARGIN, tolerances.rtol):
        return
    warn_user(
        f"J came within {near_miss.margin:.2e} of the target at t = {near_miss.time:.6g}, before "
        f"it went back by {near_miss.rebound:.2e}: under a small change of the parameters the "
        "stopping time jumps there, and its derivative does not know. Choose a target further from "
        "that turn, or treat T as discontinuous here.",
        GradientAccuracyWarning,
    )
