"""What `stopping_time` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from .core.describe import detached_state, each, joined, numbers
from .core.optional import optional_module, pictures
from .core.states import State
from .core.stats import Stats
from .crossing.near_miss import NearMiss
from .gradients.problem import StoppingProblem
from .solving.trajectory import Trajectory

__all__ = ["StoppingResult"]


@dataclass(frozen=True, repr=False)
class StoppingResult:
    """The stopping time, the state there, and how they were found.

    With targets of shape (K,): `time`, `reached` and `rate` have shape (K,), the state a first axis
    of K, `status` and `evidence` are lists of K, in the order of the targets; the trajectory and
    the counts are those of the whole run, and `problem` is None.

    Attributes:
        time: T in flow time, shape (); differentiable to the parameters of flow and criterion, to
            x0, the target and t0. Infinite for a miss (unless censored).
        state: x_T, of x0's structure; differentiable too. For a miss, the last state, without
            gradient.
        status: How the run ended, a `Status`.
        reached: Whether the target was met (REACHED, AT_START, DEGENERATE), bool tensor of shape
            ().
        rate: J'(T) = grad J^T F + dJ/dt, shape (), without gradient; NaN where there is no
            crossing.
        trajectory: The path on [t0, T].
        stats: Counts; those of the backward pass are None until a gradient was taken.
        best: Smallest value of J that was seen.
        best_time: Where it was seen, in flow time.
        note: One more sentence on how the run ended; may be empty.
        near_miss: The interior minimum of J before T that came closest to the target (a small
            margin means that T is about to jump); None where J only fell.
        evidence: Figures for the error of the gradient, an `Evidence` filled in by the backward
            pass; None where no gradient was asked for.
        problem: The solved problem, for studies of the adjoint (None if no gradient was asked for,
            and after pickling).
    """

    time: Tensor
    state: State
    status: Any  # a Status, or a list of them: a union would make every use of the first a cast
    reached: Tensor
    rate: Tensor
    trajectory: Trajectory
    stats: Stats
    best: float
    best_time: float
    note: str = ""
    near_miss: NearMiss | None = None
    evidence: Any = None
    problem: StoppingProblem | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings only; the state as nested lists."""
        state = detached_state(self.state)
        pieces = state if isinstance(state, tuple) else (state,)
        lists = [piece.tolist() for piece in pieces]
        return {
            "time": self.time.detach().tolist(),
            "state": lists if isinstance(state, tuple) else lists[0],
            "status": each(self.status, lambda status: status.name),
            "reached": self.reached.tolist(),
            "rate": self.rate.tolist(),
            "best": self.best,
            "best_time": self.best_time,
            "note": self.note,
            "near_miss": None if self.near_miss is None else asdict(self.near_miss),
            "evidence": each(self.evidence, lambda e: None if e is None else e.to_dict()),
            "stats": self.stats.to_dict(),
        }

    def to_dataframe(self) -> Any:
        """Times and values of the criterion as a pandas DataFrame (needs the extra `checks`)."""
        pandas = optional_module("pandas", "to_dataframe")
        return pandas.DataFrame(
            {"time": self.trajectory.times.tolist(), "criterion": self.trajectory.values.tolist()}
        )

    def plot(self, axes: Any = None) -> Any:
        """J over flow time with the crossing marked (matplotlib; needs the extra `checks`).

        `ode_stopping.plots.plot_criterion` takes several runs and has more options.
        """
        target = None if self.problem is None else self.problem.target
        return pictures().plot_criterion(self, axes=axes, target=target)

    def __getstate__(self) -> dict[str, Any]:
        plain = replace(
            self, time=self.time.detach(), state=detached_state(self.state), problem=None
        )
        return dict(plain.__dict__)

    def __repr__(self) -> str:
        s = self.stats
        status = joined(each(self.status, lambda status: status.name))
        lines = [
            "StoppingResult",
            f"  status      {status}" + (f" ({self.note})" if self.note else ""),
            f"  time        {numbers(self.time, 12)}",
            f"  rate        {numbers(self.rate, 6)}   (J'(T))",
            f"  best        {self.best:.6g} at t = {self.best_time:.6g}",
            f"  steps       {s.accepted} accepted, {s.rejected} rejected",
            f"  evaluations {s.nfe_forward} flow ({s.control} of them control the velocity), "
            f"{s.criterion_calls} criterion, {s.checks} checks",
        ]
        if self.near_miss is not None:
            dip = self.near_miss
            lines.append(f"  near miss   J came within {dip.margin:.3g} at t = {dip.time:.6g}")
        parts = self.evidence if isinstance(self.evidence, list) else [self.evidence]
        judged = [e for e in parts if e is not None and e.estimate is not None]
        if judged:
            estimate = max(e.estimate or 0.0 for e in judged)
            promise = judged[0].promise
            lines.append(f"  gradient    estimated error {estimate:.1e} (promise {promise:.0e})")
        if s.vjps is not None:
            lines.append(
                f"  backward    {s.vjps} vector-Jacobian products, {s.nfe_backward} flow "
                "evaluations"
            )
        return "\n".join(lines)
