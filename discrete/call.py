"""What one call of `stopping_index` asks for: made once, checked, and passed whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ode_stopping.core.functions import CriterionMap
from ode_stopping.core.leaves import LeafSet
from ode_stopping.core.rows import CriterionRows, Rows
from ode_stopping.core.states import StateLayout

from .rules.maps import UpdateMap
from .rules.rows import UpdateRows
from .rules.step_decrease import StepDecrease

__all__ = ["BatchCall", "Call", "Definition", "Route"]


class Definition(Protocol):
    """What the index is: an `IndexDefinition`."""

    needs_flow: bool
    whole: bool

    def build(self, last: Any) -> Tensor:
        """The index with its graph, shape (), float64."""


class Route(Protocol):
    """How it is differentiated: an `IndexRoute`."""

    def store(self, targets: int = 1) -> Any:
        """Where the forward run puts its states."""

    def pull_back(self, problem: Any, cotangent: Tensor) -> Any:
        """Pull a cotangent on x_{N-1} back."""


@dataclass(frozen=True)
class Call:
    """A checked call.

    Attributes:
        update: G_k on flat vectors, with its clock.
        criterion: J on flat vectors; it falls, whatever `direction` the user's J has.
        leaves: Tensors that receive gradients, besides x0, t0 and the targets.
        definition: Of the index.
        x0: Start, shape (n,), with the graph that it came with.
        begin: A copy without graph, which no function of the user's has seen.
        t0: Start time, shape (), with its graph.
        targets: The eps that it falls to, each shape (), with their graphs; no value twice.
        several: Whether the result has an axis of targets.
        missed: What a miss counts as, in steps, shape ().
        max_steps: Limit on k.
        route: Of the derivatives; None where no gradient is wanted.
        throw: Raise where the run failed.
        leave_first: Whether J has to be above a target before a fall to it counts.
        evidence: How much is asked of a gradient: "light" or "standard".
        at: The steps at which the state is asked for, in the order given.
    """

    update: UpdateMap
    criterion: CriterionMap
    leaves: LeafSet
    definition: Definition
    x0: Tensor
    begin: Tensor
    t0: Tensor
    targets: tuple[Tensor, ...]
    several: bool
    missed: Tensor
    max_steps: int
    route: Route | None
    throw: bool
    leave_first: bool = False
    evidence: Literal["light", "standard"] = "standard"
    at: tuple[int, ...] = ()

    @property
    def asked(self) -> dict[int, tuple[int, ...]]:
        """Of every step in `at` its places there."""
        places: dict[int, tuple[int, ...]] = {}
        for place, k in enumerate(self.at):
            places[k] = (*places.get(k, ()), place)
        return places

    @property
    def layout(self) -> StateLayout:
        """How the user's state is laid out in a flat vector."""
        return self.update.layout

    @property
    def values(self) -> list[float]:
        """The targets as numbers."""
        return [float(target.detach()) for target in self.targets]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Everything that the index is a function of: (x0, t0, *targets, *leaves)."""
        return (self.x0, self.t0, *self.targets, *self.leaves.tensors)

    def measures(self, flat: Tensor) -> bool:
        """Whether J is a measurement at a state; `StepDecrease` has marks as well."""
        criterion = self.criterion.function
        return not isinstance(criterion, StepDecrease) or criterion.measures(
            self.layout.unpack(flat)
        )


@dataclass(frozen=True)
class BatchCall(Call):
    """A checked call with a batch of B problems.

    `x0` and `begin` have shape (B, n), and `targets` holds one tensor, shape (B, K): K targets of
    every sample.

    Attributes:
        update: G_k on rows.
        criterion: J on rows.
        rows: All samples, with the tensors that have one row for each.
        droppable: Whether samples that have stopped may leave the computation.
    """

    update: UpdateRows
    criterion: CriterionRows
    rows: Rows = Rows(0)  # noqa: RUF009 - never changed
    droppable: bool = False

    @property
    def levels(self) -> Tensor:
        """The targets as numbers, shape (B, K), float64."""
        return self.targets[0].detach().to(torch.float64)
