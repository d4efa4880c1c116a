"""What was asked of `stopping_time`: one record, made once by the entry and passed whole.

A run has the call that it answers, a solved problem has its run. A new setting of the entry is a
field here, read where it matters; nothing in between hands it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from .core.functions import CriterionMap
from .core.leaves import LeafSet
from .core.states import StateLayout
from .solving.flow_map import FlowMap
from .solving.solver import Method, Solver, Tolerances

__all__ = ["Call", "Route"]


class Route(Protocol):
    """What a run asks of a gradient route (`gradients.route.GradientRoute`)."""

    @property
    def needs_path(self) -> bool:
        """Whether the steps have to be kept."""


@dataclass(frozen=True)
class Call:
    """A checked call.

    Attributes:
        flow: dx/dt on flat vectors.
        criterion: J on flat vectors; it falls, whatever `direction` the user's J has.
        leaves: Tensors that receive gradients as far as they are known before any evaluation.
        solver: Of the forward run.
        method: The solver's, for the dtype of the state.
        tolerances: Likewise.
        times: Start, breakpoints and horizon: the flow is smooth in t between them.
        x0: Start, shape (n,), without graph.
        targets: The values of eps that it falls to, in the order given.
        learned: The breakpoints that require grad, in the order given.
        gradient: Route of the derivatives; None: the time only, and nothing is kept.
        censored: What a miss counts as, in flow time; None: infinity.
        evidence: How much is asked of a gradient: "light", "standard" or "thorough".
        leave_first: Whether J has to be above a target before a fall to it counts.
    """

    flow: FlowMap
    criterion: CriterionMap
    leaves: LeafSet
    solver: Solver
    method: Method
    tolerances: Tolerances
    times: tuple[float, ...]
    x0: Tensor
    targets: tuple[float, ...]
    learned: tuple[float, ...] = ()
    gradient: Route | None = None
    censored: float | None = None
    evidence: Literal["light", "standard", "thorough"] = "standard"
    leave_first: bool = False

    @property
    def layout(self) -> StateLayout:
        """Layout of the state."""
        return self.flow.layout

    @property
    def start(self) -> float:
        """t0, in flow time."""
        return self.times[0]

    @property
    def keeps(self) -> bool:
        """Whether the forward run keeps its steps."""
        if self.gradient is None:
            return False
        # x and lam at a breakpoint, and what is asked of every leaf, need the steps.
        return self.gradient.needs_path or len(self.times) > 2 or not self.light

    @property
    def light(self) -> bool:
        """Whether a gradient is judged by what the solves know anyway."""
        return self.evidence == "light"

    @property
    def thorough(self) -> bool:
        """Whether steps are halved until two gradients in a row agree."""
        return self.evidence == "thorough"

    @property
    def promise(self) -> float:
        """The relative error of a gradient up to which nothing is said."""
        return self.tolerances.promise(self.x0.dtype)
