"""What `stopping_time` returns."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .evaluation import Stats
from .evidence import Evidence
from .solved import StoppingProblem
from .states import State
from .status import Status
from .trajectory import NearMiss, Trajectory

__all__ = ["StoppingResult", "detached_state", "optional_module", "scalar"]


@dataclass(frozen=True, repr=False)
class StoppingResult:
    """The stopping time, the state there, and how they were found.

    Attributes:
        time: T in flow time, shape (); differentiable to the parameters of flow and criterion, to
            x0, the target and t0. Infinite for a miss (unless censored).
        state: x_T, of x0's structure; differentiable too. For a miss, the last state, without
            gradient.
        status: How the run ended.
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
        evidence: Figures for the error of the gradient, filled in by the backward pass; None where
            no gradient was asked for.
        problem: The solved problem, for studies of the adjoint (None if no gradient was asked for,
            and after pickling).
    """

    time: Tensor
    state: State
    status: Status
    reached: Tensor
    rate: Tensor
    trajectory: Trajectory
    stats: Stats
    best: float
    best_time: float
    note: str = ""
    near_miss: NearMiss | None = None
    evidence: Evidence | None = None
    problem: StoppingProblem | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings only; the state as nested lists."""
        state = detached_state(self.state)
        pieces = state if isinstance(state, tuple) else (state,)
        lists = [piece.tolist() for piece in pieces]
        return {
            "time": float(self.time.detach()),
            "state": lists if isinstance(state, tuple) else lists[0],
            "status": self.status.name,
            "reached": bool(self.reached),
            "rate": float(self.rate),
            "best": self.best,
            "best_time": self.best_time,
            "note": self.note,
            "near_miss": None if self.near_miss is None else asdict(self.near_miss),
            "evidence": None if self.evidence is None else self.evidence.to_dict(),
            "stats": asdict(self.stats),
        }

    def to_dataframe(self) -> Any:
        """Times and values of the criterion as a pandas DataFrame (needs the extra `checks`)."""
        pandas = optional_module("pandas", "to_dataframe")
        return pandas.DataFrame(
            {"time": self.trajectory.times.tolist(), "criterion": self.trajectory.values.tolist()}
        )

    def plot(self, axes: Any = None) -> Any:
        """J over flow time with the crossing marked (matplotlib; needs the extra `checks`)."""
        if axes is None:
            axes = optional_module("matplotlib.pyplot", "plot").figure().add_subplot()
        values = self.trajectory.values
        axes.plot(self.trajectory.times, values, marker=".", label="J(x(t))")
        if bool(self.reached):
            axes.plot(
                float(self.time.detach()),
                float(values[-1]),
                "o",
                label=f"T = {float(self.time.detach()):.5g}",
            )
        if bool((values > 0).all()):
            axes.set_yscale("log")
        axes.set_xlabel("flow time t")
        axes.set_ylabel("criterion J")
        axes.legend()
        return axes

    def __getstate__(self) -> dict[str, Any]:
        plain = replace(
            self, time=self.time.detach(), state=detached_state(self.state), problem=None
        )
        return dict(plain.__dict__)

    def __repr__(self) -> str:
        s = self.stats
        lines = [
            "StoppingResult",
            f"  status      {self.status.name}" + (f" ({self.note})" if self.note else ""),
            f"  time        {float(self.time.detach()):.12g}",
            f"  rate        {float(self.rate):.6g}   (J'(T))",
            f"  best        {self.best:.6g} at t = {self.best_time:.6g}",
            f"  steps       {s.accepted} accepted, {s.rejected} rejected",
            f"  evaluations {s.nfe_forward} flow ({s.control} of them control the velocity), "
            f"{s.criterion_calls} criterion, {s.checks} checks",
        ]
        if self.near_miss is not None:
            dip = self.near_miss
            lines.append(f"  near miss   J came within {dip.margin:.3g} at t = {dip.time:.6g}")
        if self.evidence is not None and self.evidence.estimate is not None:
            evidence = self.evidence
            lines.append(
                f"  gradient    estimated error {evidence.estimate:.1e} (promise "
                f"{evidence.promise:.0e})"
            )
        if s.vjps is not None:
            lines.append(
                f"  backward    {s.vjps} vector-Jacobian products, {s.nfe_backward} flow "
                "evaluations"
            )
        return "\n".join(lines)


def detached_state(state: State) -> State:
    """The state without its graph."""
    if isinstance(state, tuple):
        return tuple(piece.detach() for piece in state)
    return state.detach()


def optional_module(module: str, what: str) -> Any:
    """Import what an extra brings; where it is missing, say what needs it and which extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{what} needs {module.split(".")[0]}: pip install "ode-stopping[checks]"'
        ) from error


def scalar(value: float, like: Tensor) -> Tensor:
    """A 0-d float64 tensor on the device of `like`: times are not rounded to the state's dtype."""
    return torch.tensor(value, dtype=torch.float64, device=like.device)
