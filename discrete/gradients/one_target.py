"""A run to one target: the search, and the graph of what it found."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ode_stopping.core.describe import scalar
from ode_stopping.core.functions import CriterionMap
from ode_stopping.core.guards import MissedValue, ZeroWithGraph
from ode_stopping.core.leaves import LeafSet
from ode_stopping.core.stats import Stats
from ode_stopping.core.status import GradientError, Status, StoppingWarning
from ode_stopping.core.validation import refuse_lost_views

from ..iterating.iteration import UpdateMap
from ..iterating.run import IndexSearch, find_index
from ..iterating.store import StateStore
from ..rules.step_decrease import StepDecrease
from .adjoint import IndexRoute
from .attach import attach_index, evaluate_index
from .index import IndexDefinition
from .problem import IndexProblem
from .tracing import check_functions, trace_leaves

__all__ = ["Outcome", "Setup", "attached"]


@dataclass(frozen=True)
class Setup:
    """A checked call with one target; or its part up to one of several.

    Attributes:
        update: G_k on flat vectors.
        criterion: J on flat vectors.
        leaves: Tensors that receive gradients, besides x0, t0 and the target.
        store: Receives the states; None where no gradient is wanted.
        definition: Of the index.
        x0: Start, shape (n,), without graph.
        target: eps.
        missed: What a miss counts as, in steps, shape ().
        max_steps: Limit on k.
        stats: Counts, filled in.
        first: Index of the start, where the run goes on with another.
    """

    update: UpdateMap
    criterion: CriterionMap
    leaves: LeafSet
    store: StateStore | None
    definition: IndexDefinition
    x0: Tensor
    target: float
    missed: Tensor
    max_steps: int
    stats: Stats
    first: int = 0

    def search(self) -> IndexSearch:
        """The forward run."""
        return find_index(
            self.update,
            self.criterion,
            self.x0,
            self.target,
            max_steps=self.max_steps,
            store=self.store,
            stats=self.stats,
            first=self.first,
        )

    def measures(self, state: Tensor) -> bool:
        """Whether J is a measurement at a state; `StepDecrease` has marks as well."""
        criterion = self.criterion.function
        unpacked = self.criterion.layout.unpack(state)
        return not isinstance(criterion, StepDecrease) or criterion.measures(unpacked)

    def solved(self, search: IndexSearch) -> IndexProblem:
        """The problem as the routes see it, after the target was met by a step."""
        return IndexProblem(
            update=self.update,
            criterion=self.criterion,
            clock=self.update.clock,
            leaves=self.leaves,
            store=self.store,
            x0=self.x0,
            previous=search.previous,
            state=search.state,
            index=search.index,
            previous_loss=search.losses[-2],
            loss=search.losses[-1],
            target=self.target,
            stats=self.stats,
            first=self.first,
        )


@dataclass(frozen=True)
class Outcome:
    """A run and what it hands out.

    Attributes:
        setup: The call.
        search: The forward run.
        target: eps.
        steps: The index with its graph, shape (), float64.
        state: The state at the end with its graph, shape (n,).
        problem: The solved problem, where the target was met by a step.
    """

    setup: Setup
    search: IndexSearch
    target: float
    steps: Tensor
    state: Tensor
    problem: IndexProblem | None


def attached(
    setup: Setup,
    search: IndexSearch,
    gradient: IndexRoute | None,
    inputs: tuple[Tensor, Tensor],
    targets: Sequence[Tensor],
    *,
    check: bool = True,
) -> list[Outcome]:
    """The index and the end state with the graph that the outcome allows, for each target.

    Args:
        setup: The call.
        search: Its forward run.
        gradient: Route.
        inputs: x0 and t0 with their graphs.
        targets: Those that the run ended on, all met in one step where one was met.
        check: Compare the derivatives of update and criterion with differences.
    """
    leaves, missed, definition = setup.leaves, setup.missed, setup.definition
    values = [float(target.detach()) for target in targets]

    def outcomes(
        steps: Sequence[Tensor], state: Tensor, problems: Sequence[IndexProblem] | None = None
    ) -> list[Outcome]:
        setup.stats.checks = setup.update.calls - setup.stats.nfe_forward
        own = [None] * len(values) if problems is None else problems
        return [
            Outcome(setup, search, value, one, state, problem)
            for value, one, problem in zip(values, steps, own, strict=True)
        ]

    problems = None
    if search.status is Status.REACHED:
        problems = [replace(setup.solved(search), target=value) for value in values]
        _warn_about_marks(setup, problems[0])
    if gradient is None or setup.store is None or not torch.is_grad_enabled():
        if problems is not None:
            found = [scalar(evaluate_index(own, definition), search.state) for own in problems]
            return outcomes(found, search.state, problems)
        end = scalar(0.0, search.state) if search.status is Status.AT_START else missed
        return outcomes([end] * len(values), search.state)
    trace_leaves(search, setup.update, setup.criterion, leaves, setup.store)
    tensors = (*inputs, *targets, *leaves.tensors)
    # A view that is named counts as an input; the leaf behind it may be older all the same.
    refuse_lost_views(has_history=leaves.has_history)
    if problems is not None:
        problem = problems[0]
        if check and _needs_grad(tensors, leaves):
            moved = inputs[1].requires_grad or isinstance(setup.update.clock.step, Tensor)
            check_functions(problem, clock_matters=moved or definition.needs_flow)
        indices = [evaluate_index(own, definition) for own in problems]
        steps, state = attach_index(problems, definition, gradient, indices, inputs, targets)
        if not setup.measures(problem.previous):
            for one in steps:
                _refuse_meaningless(one, problem)
        return outcomes(steps, state, problems)
    if search.status is Status.AT_START:
        zero = ZeroWithGraph.apply(*tensors)
        return outcomes([zero] * len(values), inputs[0] + zero.to(inputs[0].dtype))
    if not any(tensor.requires_grad for tensor in tensors):
        return outcomes([missed] * len(values), search.state)
    if bool(torch.isfinite(missed)):
        counted = missed + ZeroWithGraph.apply(*tensors)
        return outcomes([counted] * len(values), search.state)
    where = f"{search.status.name}: {search.status.value}"
    lost, state = MissedValue.apply(where, missed, search.state, *tensors)
    return outcomes([lost] * len(values), state)


def _needs_grad(tensors: Iterable[Tensor], leaves: LeafSet) -> bool:
    # An evaluation without a graph hides its leaves: then nobody knows what is needed.
    return leaves.has_gap or any(tensor.requires_grad for tensor in tensors)


def _warn_about_marks(setup: Setup, problem: IndexProblem) -> None:
    """Warn where a fraction of the last step is asked for and J_{N-1} is no measurement."""
    if setup.definition.whole or setup.measures(problem.previous):
        return
    warnings.warn(
        f"step {problem.index - 1} has no value of the criterion to interpolate from (it is the "
        "start, or f went up there): the fraction of the index says nothing. Use "
        "interpolation=None",
        StoppingWarning,
        stacklevel=4,
    )


def _refuse_meaningless(steps: Tensor, problem: IndexProblem) -> None:
    """Where J_{N-1} is a mark and no measurement, the quotient over the last step says nothing."""
    n = problem.index
    message = (
        f"the criterion has no value at step {n - 1} (J = {problem.previous_loss:g} there is a "
        f"mark, as at the start and after an increase), so J_N - J_(N-1) at N = {n} is no "
        "difference quotient: the index has no derivative here. Choose a smaller target, a "
        "smaller step, or gradient=None"
    )

    def refuse(cotangent: Tensor | None) -> None:
        if cotangent is not None and bool(cotangent != 0):
            raise GradientError(message)

    if steps.requires_grad:
        steps.register_hook(refuse)
