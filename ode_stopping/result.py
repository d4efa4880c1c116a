"""What `stopping_time` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .core.describe import detached_state, each, joined, numbers
from .core.optional import optional_module, pictures
from .core.states import State
from .core.stats import Costs, Stats
from .core.status import ERROR_OF_STATUS, Status
from .crossing.near_miss import NearMiss, closest
from .crossing.run import Run
from .gradients.attach import Attached, Differentiation
from .gradients.problem import StoppingProblem
from .solving.trajectory import Trajectory

__all__ = ["StoppingResult", "require_success", "result_of"]

_HITS = (Status.REACHED, Status.AT_START, Status.DEGENERATE)


class _Evidences:
    """The evidence for each target: of the latest backward pass, or as it was pickled.

    Args:
        fixed: One entry a target; used where there is nothing to differentiate.
        differentiation: The solved problem.
    """

    def __init__(
        self, fixed: tuple[Any, ...], differentiation: Differentiation | None = None
    ) -> None:
        self._fixed = fixed
        self._differentiation = differentiation

    def latest(self) -> list[Any]:
        """One entry a target, None for those without a gradient."""
        found = list(self._fixed)
        if self._differentiation is not None:
            parts = self._differentiation
            for hit, evidence in zip(parts.chain.hits, parts.evidence, strict=True):
                found[hit.watch.index] = evidence
        return found


@dataclass(frozen=True, repr=False)
class StoppingResult:
    """The stopping time, the state there, and how they were found.

    With targets of shape (K,): `time`, `reached` and `rate` have shape (K,), the state a first axis
    of K, `status` and `evidence` are lists of K, in the order of the targets; the trajectory and
    the counts are those of the whole run.

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
        best: Smallest value of J that was seen; the largest with direction="rising".
        best_time: Where it was seen, in flow time.
        note: One more sentence on how the run ended; may be empty.
        near_miss: The interior minimum of J before T that came closest to the target (a small
            margin means that T is about to jump); None where J only fell. Where J rises to the
            target, or has to leave it first: the turn that came closest.
        problem: The solved problem, for studies of the adjoint (None if no gradient was asked for,
            and after pickling).
        stats: Counts; those of the backward pass are None until a gradient was taken, then those of
            the latest.
        evidence: Figures for the error of the latest gradient, an `Evidence`; None where no
            gradient was asked for, and for targets that have none.
    """

    time: Tensor
    state: State
    status: Any  # a Status, or a list of them: a union would make every use of the first a cast
    reached: Tensor
    rate: Tensor
    trajectory: Trajectory
    best: float
    best_time: float
    note: str = ""
    near_miss: NearMiss | None = None
    _costs: Costs = field(default_factory=lambda: Costs(Stats()), compare=False)
    _evidence: _Evidences = field(default_factory=lambda: _Evidences(()), compare=False)
    problem: StoppingProblem | None = field(default=None, compare=False)

    @property
    def stats(self) -> Stats:
        """What it cost so far."""
        return self._costs.total

    @property
    def evidence(self) -> Any:
        """What speaks for the latest gradient; a list for several targets."""
        found = self._evidence.latest()
        return found if isinstance(self.status, list) else found[0]

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
        problem = self.problem
        target = None if problem is None else problem.criterion.shown(problem.target)
        return pictures().plot_criterion(self, axes=axes, target=target)

    def __getstate__(self) -> dict[str, Any]:
        plain = replace(
            self,
            time=self.time.detach(),
            state=detached_state(self.state),
            problem=None,
            _costs=Costs(self.stats),
            _evidence=_Evidences(tuple(self._evidence.latest())),
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
        if s.fallback is not None:
            lines.append(f"  route       {s.route}: {s.fallback}")
        return "\n".join(lines)


def result_of(run: Run, found: Attached, *, several: bool) -> StoppingResult:
    """The result of a run.

    Args:
        run: What was found.
        found: The same with graphs.
        several: Whether the target was a vector.
    """
    call = run.call
    hits = [run.hit(watch.index) for watch in call.watches]
    status = [run.status if hit is None else hit.status for hit in hits]
    reached = torch.tensor([s in _HITS for s in status], device=run.state.device)
    nan = float("nan")
    rates = [
        nan if h is None or h.point is None else h.watch.criterion.shown(h.point.rate) for h in hits
    ]
    rate = torch.tensor(rates, dtype=torch.float64, device=run.state.device)
    misses = [run.near_miss if hit is None else hit.near_miss for hit in hits]
    differentiation = found.differentiation
    time, state = torch.stack(found.times), torch.stack(found.states)
    return StoppingResult(
        time=time if several else found.times[0],
        state=call.layout.unpack(state if several else found.states[0]),
        status=status if several else status[0],
        reached=reached if several else reached[0],
        rate=rate if several else rate[0],
        trajectory=run.trajectory,
        best=run.best[0],
        best_time=run.best[1],
        note=run.note,
        near_miss=closest(misses),
        _costs=found.costs,
        _evidence=_Evidences((None,) * len(hits), differentiation),
        problem=None if differentiation is None else differentiation.chain.problems[0],
    )


def require_success(run: Run, result: StoppingResult) -> None:
    """Raise what the status of a target calls for.

    Raises:
        StoppingError: DEGENERATE, DIVERGED or STALLED.
    """
    several = isinstance(result.status, list)
    for watch in sorted(run.call.watches, key=lambda watch: -watch.target):
        hit = run.hit(watch.index)
        status = run.status if hit is None else hit.status
        error = ERROR_OF_STATUS.get(status)
        if error is None:
            continue
        time, note = (run.time, run.note) if hit is None else (hit.time, hit.note)
        target = watch.criterion.shown(watch.target)
        where = f"target {target:g}: " if several else ""
        raise error(
            f"{where}{status.name}: {status.value} [{note}; t = {time:.9g}, "
            f"{run.stats.accepted} steps, best J = {run.best[0]:.6g} at t = {run.best[1]:.6g}]",
            time=time,
            step=run.stats.accepted,
            best=run.best[0],
            result=result,
        )
