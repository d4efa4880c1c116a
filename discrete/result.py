"""What `stopping_index` returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import nan
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.describe import detached_state, each, joined, numbers
from ode_stopping.core.optional import optional_module, pictures
from ode_stopping.core.states import State, StateLayout
from ode_stopping.core.stats import Costs, Stats
from ode_stopping.core.status import ERROR_OF_STATUS

from .gradients.attach import Attached
from .gradients.problem import IndexProblem
from .iterating.run import Run
from .iterating.store import StateStore
from .rules.maps import Clock

__all__ = ["IndexTrajectory", "StoppingIndexResult", "finished"]


class IndexTrajectory:
    """The losses of a run, and those of its states that were kept.

    Attributes:
        losses: J(x_k), k = 0..N, shape (N + 1,), float64.
        clock: (t0, h), for pictures over flow time; None where the update has no step.
    """

    def __init__(
        self,
        layout: StateLayout,
        losses: list[float],
        store: StateStore | None,
        *,
        clock: tuple[float, float] | None = None,
    ) -> None:
        self.clock = clock
        self._layout = layout
        self._store = store
        self.losses = torch.tensor(losses, dtype=torch.float64)

    @property
    def indices(self) -> list[int]:
        """Steps whose states were kept."""
        return self._store.indices() if self._store is not None else []

    @property
    def states(self) -> State:
        """The kept states in the order of `indices`; each piece has shape (len(indices), ...).

        Raises:
            RuntimeError: None were kept.
        """
        if self._store is None or not self.indices:
            raise RuntimeError("no states were kept: the route needs none, or gradient=None")
        kept = [self._store.get(k) for k in self.indices]
        return self._layout.unpack(torch.stack([state for state in kept if state is not None]))

    def plot(self, axes: Any = None) -> Any:
        """The entries of x_k over k, of the kept states (matplotlib; needs the extra `checks`)."""
        return pictures().plot_states(self, axes=axes)

    def __len__(self) -> int:
        return len(self.losses)

    def __repr__(self) -> str:
        return f"IndexTrajectory({len(self)} losses, {len(self.indices)} states)"


@dataclass(frozen=True, repr=False)
class StoppingIndexResult:
    """The stopping index, its differentiable form, and how the run went.

    With targets of shape (K,): `index`, `steps`, `time`, `reached` and `decrease` have shape (K,),
    the state a first axis of K, and `status` is a list of K, in the order of the targets; the
    trajectory and the counts are those of the whole run, and `problem` is None.

    Of a batch (`batched=True`) everything has a first axis of B samples, before that of K targets
    where they have one: `status` is a list of B (of lists of K), `best` and `best_index` have shape
    (B,), `trajectory.losses` shape (steps, B) with NaN behind a sample's end, `states_at` shape
    (len(at), B, ...). The update and the criterion are counted once for all samples; `row_steps` is
    the number of steps of single samples that were computed.

    Attributes:
        index: N in steps; -1 for a miss.
        steps: N (Definition 3) or N* (fractional) in steps, shape (), float64; differentiable.
            Infinite for a miss (unless censored).
        time: t0 + h steps, in flow time, shape (); None where the update has no step.
        state: x_N, differentiable with N held fixed.
        status: How the run ended.
        reached: bool tensor, shape ().
        decrease: J(x_N) - J(x_{N-1}), shape (), float64; NaN where N < 1. Positive with
            direction="rising".
        trajectory: The losses, and the states that were kept.
        costs: Counts of the run, and of the latest backward pass.
        best: Smallest J that was seen; the largest with direction="rising".
        best_index: Its step.
        note: One more sentence on how the run ended.
        problem: The solved problem, for studies of the adjoint; None without a gradient, after
            pickling, and where `at` cuts the run into parts.
        states_at: x_k at the steps `at`, each piece of shape (len(at), ...), in the order asked;
            differentiable. NaN beyond the end, which raises where it is differentiated.
        row_steps: Of a batch, how many steps of single samples the forward run computed.
    """

    index: Any  # an int, or a tensor of them
    steps: Tensor
    time: Tensor | None
    state: State
    status: Any  # a Status, or a list of them
    reached: Tensor
    decrease: Tensor
    trajectory: IndexTrajectory
    costs: Costs
    best: Any  # a float, or a tensor of them
    best_index: Any
    note: str = ""
    problem: IndexProblem | None = field(default=None, compare=False)
    states_at: State = field(default_factory=lambda: torch.zeros(0))
    row_steps: int | None = None

    @property
    def stats(self) -> Stats:
        """Counts; evaluations are of the update."""
        return self.costs.total

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings only; the state as nested lists."""
        state = detached_state(self.state)
        return {
            "index": _plain(self.index),
            "steps": self.steps.detach().tolist(),
            "time": None if self.time is None else self.time.detach().tolist(),
            "state": _lists(state),
            "status": each(self.status, lambda status: status.name),
            "reached": self.reached.tolist(),
            "decrease": self.decrease.tolist(),
            "best": _plain(self.best),
            "best_index": _plain(self.best_index),
            "note": self.note,
            "states_at": _lists(detached_state(self.states_at)),
            "stats": self.stats.to_dict(),
        }

    def to_dataframe(self) -> Any:
        """Steps and losses as a pandas DataFrame (needs the extra `checks`).

        Of a batch one column a sample, NaN behind its end.
        """
        pandas = optional_module("pandas", "to_dataframe")
        losses = self.trajectory.losses
        if losses.ndim == 2:
            columns = {f"criterion_{i}": one.tolist() for i, one in enumerate(losses.unbind(1))}
            return pandas.DataFrame({"step": range(len(losses)), **columns})
        return pandas.DataFrame({"step": range(len(losses)), "criterion": losses.tolist()})

    def plot(self, axes: Any = None) -> Any:
        """J over steps with N marked, on matplotlib axes (needs the extra `checks`).

        `ode_stopping.plots.plot_criterion` takes several runs and has more options.
        """
        if self.trajectory.losses.ndim == 2:
            raise NotImplementedError(
                "a batch has no picture of its own: plot trajectory.losses, one column a sample"
            )
        problem = self.problem
        target = None if problem is None else problem.criterion.shown(problem.target)
        return pictures().plot_criterion(self, axes=axes, target=target)

    def __getstate__(self) -> dict[str, Any]:
        plain = replace(
            self,
            steps=self.steps.detach(),
            time=None if self.time is None else self.time.detach(),
            state=detached_state(self.state),
            states_at=detached_state(self.states_at),
            problem=None,
        )
        return dict(plain.__dict__)

    def __repr__(self) -> str:
        s = self.stats
        status = joined(each(self.status, lambda status: status.name))
        index = numbers(torch.as_tensor(self.index, dtype=torch.float64), 12)
        lines = [
            "StoppingIndexResult",
            f"  status      {status}" + (f" ({self.note})" if self.note else ""),
            f"  index       {index}",
            f"  steps       {numbers(self.steps, 12)}",
            f"  decrease    {numbers(self.decrease, 6)}   (J_N - J_(N-1))",
            f"  best        {numbers(torch.as_tensor(self.best), 6)} at step "
            f"{numbers(torch.as_tensor(self.best_index), 12)}",
            f"  evaluations {s.nfe_forward} update, {s.criterion_calls} criterion, "
            f"{s.checks} checks",
        ]
        if self.time is not None:
            lines.insert(4, f"  time        {numbers(self.time, 12)}")
        if s.vjps is not None:
            lines.append(f"  backward    {s.vjps} steps replayed and differentiated")
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _lists(state: State) -> Any:
    return [p.tolist() for p in state] if isinstance(state, tuple) else state.tolist()


def finished(attached: Attached) -> StoppingIndexResult:
    """The result of a run, for one target or with an axis of several.

    Raises:
        StoppingError: The run diverged, and `throw` is True.
    """
    run, call, device = attached.run, attached.run.call, attached.run.state.device
    clock, ruled = call.update.clock, call.update.rule is not None
    hits = [run.hit(k) for k in range(len(call.targets))]
    times = [_time(clock, steps) for steps in attached.steps] if ruled else []
    best, best_index = run.best
    shown = call.criterion.shown
    given: dict[str, Any] = {
        "index": torch.tensor([-1 if hit is None else hit.index for hit in hits]),
        "steps": torch.stack(attached.steps),
        "time": torch.stack(times) if ruled else None,
        "state": torch.stack(attached.states),
        "status": [run.status_of(k) for k in range(len(hits))],
        "reached": torch.tensor([hit is not None for hit in hits], device=device),
        "decrease": torch.tensor(
            [nan if problem is None else shown(problem.decrease) for problem in attached.problems],
            dtype=torch.float64,
            device=device,
        ),
    }
    if not call.several:
        given = {name: None if value is None else value[0] for name, value in given.items()}
        given["index"] = int(given["index"])
    given["state"] = call.layout.unpack(given["state"])
    first, rows = attached.problems[0], attached.states_at
    at = torch.stack(rows) if rows else run.state.new_zeros((0, run.state.numel()))
    result = StoppingIndexResult(
        **given,
        states_at=call.layout.unpack(at),
        trajectory=IndexTrajectory(
            call.layout,
            [shown(loss) for loss in run.losses],
            run.store,
            clock=(clock.start_value, clock.step_value) if ruled else None,
        ),
        costs=attached.costs,
        best=best,
        best_index=best_index,
        note=run.note,
        problem=first if len(run.hits) == 1 and not call.several else None,
    )
    if call.throw:
        _raise_failure(run, result)
    return result


def _time(clock: Clock, steps: Tensor) -> Tensor:
    """t0 + h steps; a miss by way of the steps alone, since 0 * inf on the way back is NaN."""
    return clock.start + clock.step * steps if bool(torch.isfinite(steps)) else steps


def _raise_failure(run: Run, result: StoppingIndexResult) -> None:
    error = ERROR_OF_STATUS.get(run.status)
    if error is None:
        return
    best, best_index = run.best
    missed = [value for k, value in enumerate(run.call.values) if run.hit(k) is None]
    where = f"target {run.call.criterion.shown(max(missed)):g}: " if run.call.several else ""
    raise error(
        f"{where}{run.status.name}: {run.status.value} [{run.note}; best J = {best:.6g} at step "
        f"{best_index}]",
        time=run.call.update.clock.time(run.index),
        step=run.index,
        best=best,
        result=result,
    )
