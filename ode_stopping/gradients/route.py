"""What a route is: one method that pulls a cotangent back through the flow map at fixed times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.status import GradientError
from .problem import Jump, Piece, StoppingProblem

__all__ = ["GradientRoute", "PullBack"]


@dataclass(frozen=True)
class PullBack:
    """A cotangent lam(T) on x_T, pulled back through x_T = flow map (theta, x0, t0) at fixed T.

    Figures that a route does not have are None, which makes the verdict on its gradient worse.

    Attributes:
        start: lam(t0), shape (n,): the cotangent on x0.
        leaves: int_{t0}^{T} F_theta^T lam dt, one tensor a leaf.
        time: int_{t0}^{T} F_t^T lam dt, or None where the route does not compute it. It is
            redundant: lam(t0)^T F(t0, x0) = lam(T)^T F(T, x_T) - time, and so it checks lam.
        samples: lam at the times that were asked for, shape (len(times), n); None if none were.
        quadrature_errors: Norm of the difference to a second quadrature of each entry of `leaves`;
            None where there is none.
        defect: Sum over the forward steps of lam^T (error estimate): by how much lam(T)^T x_T is
            wrong; None where no steps were kept.
        departure: Largest departure of lam(t)^T F + int_t^T F_t^T lam from lam(T)^T F(T) over the
            forward steps, relative to sum_i |lam_i F_i|; None where no steps were kept.
        start_rate: lam(t0)^T F(t0, x0), from what it has to be at the end of the first smooth
            stretch, which does not cancel where lam(t0)^T F(t0, x0) itself does.
        sizes: What lam(t0), lam^T F and each entry of `leaves` would be without cancellation: the
            largest |lam| and the largest sum_i |lam_i F_i| on the path, and sums of the norms of
            the parts; None: not known.
        masses: lam^T (F(b+) - F(b-)) at the times b at which the flow jumps, by the time; None: not
            known.
        vjps: Vector-Jacobian products that it took; None: those that the flow was asked for.
        route: Name of the route that made it; None: the one that was asked for.
        fallback: Why it is another one.
    """

    start: Tensor
    leaves: list[Tensor]
    time: float | None = None
    samples: Tensor | None = None
    quadrature_errors: list[float] | None = None
    defect: float | None = None
    departure: float | None = None
    start_rate: float | None = None
    sizes: tuple[float, ...] | None = None
    masses: Mapping[float, float] | None = None
    vjps: int | None = None
    route: str | None = None
    fallback: str | None = None

    def before(self, later: PullBack, mass: float) -> PullBack:
        """The pull-back of two stretches of time, of which `later` is the second.

        Args:
            later: Of the second stretch; `self.start` belongs to the first.
            mass: What lam^T F_t has at the time between them, where the flow jumps.
        """

        def both(a: Any, b: Any, total: Any) -> Any:
            return None if a is None or b is None else total

        errors, others = self.quadrature_errors, later.quadrature_errors
        return replace(
            self,
            leaves=[a + b for a, b in zip(self.leaves, later.leaves, strict=True)],
            time=both(self.time, later.time, (self.time or 0.0) + (later.time or 0.0) + mass),
            quadrature_errors=None
            if errors is None or others is None
            else [a + b for a, b in zip(errors, others, strict=True)],
            defect=both(self.defect, later.defect, (self.defect or 0.0) + (later.defect or 0.0)),
            departure=both(
                self.departure, later.departure, max(self.departure or 0.0, later.departure or 0.0)
            ),
            start_rate=None,
            sizes=None,
            vjps=both(self.vjps, later.vjps, (self.vjps or 0) + (later.vjps or 0)),
        )


class GradientRoute(ABC):
    """A way to differentiate the state at a fixed time; the quotient is none of its business.

    A route of one's own writes `pull_back` for one smooth stretch of the path; several targets and
    jumps of the flow are walked here. Its gradient is held against that of `InterpolatingAdjoint`
    in every backward pass, at that one's cost, unless the class itself declares its figures.

    Attributes:
        keeps_trajectory: Whether the forward run has to keep its steps for this route.
        figures: Names of the figures of the evidence that this class vouches for. A subclass does
            not inherit them, for it may compute something else: it declares its own.
        own_graph: Whether the route attaches T and x_T itself (`graph`), with second derivatives.
            A subclass that writes `pull_back` does not inherit it.
    """

    keeps_trajectory: bool = True
    figures: ClassVar[tuple[str, ...]] = ()
    own_graph: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "figures" not in cls.__dict__:
            cls.figures = ()
        if "pull_back" in cls.__dict__ and "own_graph" not in cls.__dict__:
            cls.own_graph = False
        # A subclass that writes the one is not to be passed by with the other.
        if "pull_back" in cls.__dict__ and "pull_back_path" not in cls.__dict__:
            cls.pull_back_path = GradientRoute.pull_back_path  # type: ignore[method-assign]

    @property
    def needs_path(self) -> bool:
        """Whether the steps are kept: for the route, or for what it is held against."""
        return self.keeps_trajectory or not self.figures

    def vouches_for(self, path: Piece) -> tuple[str, ...]:
        """The figures that the route vouches for on this path."""
        return self.figures

    @abstractmethod
    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        """Pull `cotangent` = lam(end), shape (n,), back to the start of the stretch and the leaves.

        Args:
            piece: A stretch on which the flow is smooth in t.
            cotangent: On x at its end.

        Raises:
            GradientError: The route cannot give this derivative to its accuracy.
        """

    def pull_back_path(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        """Take lam from the last of the jumps to the start of the path, jump by jump.

        Args:
            path: The path.
            jumps: What lam gains at the hits, in order of time.
        """
        lam, found = torch.zeros_like(path.x0), None
        masses: dict[float, float] = {}
        for piece, gained in reversed(_stretches(path, jumps)):
            for jump in gained:
                if jump.steps:
                    aside = self.pull_back(path.made_of(jump.steps), jump.cotangent)
                    found = aside if found is None else aside.before(found, 0.0)
                    lam = lam + aside.start
                else:
                    lam = lam + jump.cotangent
            if piece is not None:
                pulled = self.pull_back(piece, lam)
                mass = masses[piece.end] = _mass(path, piece, lam)
                found = pulled if found is None else pulled.before(found, mass)
                lam = pulled.start
        assert found is not None
        return replace(found, start=lam, masses=masses)

    def graph(
        self,
        problem: StoppingProblem,
        x0: Tensor,
        t0: Tensor,
        targets: Sequence[Tensor],
        breakpoints: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """T and x_T of every hit with an ordinary graph; for a route with `own_graph`.

        Args:
            problem: The solved problem.
            x0: The start, shape (n,).
            t0: The start time, shape ().
            targets: One a hit, each of shape ().
            breakpoints: Those that require grad, each of shape ().
        """
        raise NotImplementedError("a route with own_graph = True writes graph()")


def _mass(path: Piece, before: Piece, lam: Tensor) -> float:
    """What lam^T F_t has at the end of a stretch: the jump of the flow there, if there is one."""
    after = next((step for step in path.steps if step.t0 == before.end), None)
    return 0.0 if after is None else float(lam @ (after.f0 - before.velocity))


def _stretches(path: Piece, jumps: Sequence[Jump]) -> list[tuple[Piece | None, list[Jump]]]:
    """Smooth stretches between nodes, each with what lam gains at its end; None: at the start."""
    if not path.steps:
        if len(jumps) > 1:
            raise GradientError(
                "this route keeps no steps, so it cannot be walked from target to target: set "
                "keeps_trajectory = True, or call stopping_time once a target"
            )
        return [(path, [replace(jump, steps=()) for jump in jumps])]
    last = max(jump.node for jump in jumps)
    nodes = {jump.node for jump in jumps} | {0, last}
    nodes |= {i for i, step in enumerate(path.steps[:last]) if step.t0 in path.times[1:-1]}
    ordered = sorted(nodes)
    gained = {node: [jump for jump in jumps if jump.node == node] for node in ordered}
    pieces = [(path.between(a, b), gained[b]) for a, b in pairwise(ordered)]
    return [(None, gained[0]), *pieces]
