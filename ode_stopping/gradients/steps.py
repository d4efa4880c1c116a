"""The exact transpose of the accepted steps.

    y_{i+1} = Phi(y_i; t_i, h_i, theta)
    lam_i = Phi_y^T lam_{i+1},   L_theta += Phi_theta^T lam_{i+1},

with the step sizes held, the last step being the one that ends at T. It is Algorithm 1 of arXiv
2505.22509 for the solver's own iteration, and what `DirectAdjoint` computes, without its memory: a
few steps at a time are replayed under autograd from the kept state, and have to arrive at the kept
end.

Where the controller let steps go beyond the limit of stability, which does no harm to x, the
transpose amplifies lam without bound; where the flow has kinks, it is the derivative of steps over
them. The identity lam^T F + int F_t^T lam = const shows both. It is looked at along the whole path,
and where it departs by more than the promise the continuous adjoint takes the place of the
transpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from ..core.consistency import noise_like
from ..core.status import NotReproducibleError
from ..core.sweep import Sweep
from ..core.validation import require_count
from ..solving.step import Step
from .backward_solve import Augmented
from .interpolating import InterpolatingAdjoint
from .problem import Jump, Piece
from .route import GradientRoute, PullBack
from .staged import Disagreement, Products

__all__ = ["OverJumps", "StepAdjoint", "Transpose"]

# A residual that is this large against what lam received is no error of a solver.
_GARBAGE = 0.1
_VOUCHED_ORDER = 4
# Numbers in the states of one chunk: small states share a graph, large ones have one a step.
_CHUNK_NUMBERS = 2**16
_LONGEST_CHUNK = 16
# Numbers in x from which on recorded products pay: of fewer, chunks share autograd's overhead.
_LARGE_STATE = 1000


@dataclass(frozen=True)
class Transpose(GradientRoute):
    """The transpose of the accepted steps, good or not: what `StepAdjoint` looks at.

    Args:
        chunk: Number of steps in one graph; None: 16 for small states, fewer for large ones.

    Raises:
        TypeError, ValueError: `chunk` is not a positive integer.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None:
            require_count(self.chunk, name="chunk")

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        """See `GradientRoute.pull_back`; the flow may jump on the way."""
        return self._solve(piece, [piece.at_end(cotangent)])

    def pull_back_path(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        """See `GradientRoute.pull_back_path`."""
        return self._solve(path, jumps)

    @property
    def _over(self) -> Mapping[int, Tensor]:
        """What lam loses where steps begin that go over jumps, by the number of the step."""
        return {}

    def _solve(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        recorded = Products.of(path, Augmented(path).derivative, least=_LARGE_STATE)
        if recorded is not None:
            try:
                return self._attempt(path, jumps, recorded)
            except Disagreement:
                pass
        return self._attempt(path, jumps, None)

    def _attempt(self, path: Piece, jumps: Sequence[Jump], recorded: Products | None) -> PullBack:
        transpose, over = _Transpose(path, jumps, recorded), self._over
        # The steps of a hit branch off from the step of the path after their node.
        last = max(jump.node + bool(jump.steps) for jump in jumps)
        named = {i for i, step in enumerate(path.steps[:last]) if step.t0 in path.times[1:-1]}
        nodes = sorted({0, last, *named, *(i for i in over if i < last)})
        for begin, end in reversed(list(pairwise(nodes))):
            for stop in range(end, begin, -self._chunk(path)):
                first = max(stop - self._chunk(path), begin)
                transpose.through(first, stop, over.get(first))
            if begin in named:
                transpose.over_the_jump(begin)
        if recorded is not None:
            recorded.finish()
        return transpose.result()

    def _chunk(self, path: Piece) -> int:
        if self.chunk is not None:
            return self.chunk
        return min(max(_CHUNK_NUMBERS // max(path.x0.numel(), 1), 1), _LONGEST_CHUNK)


@dataclass(frozen=True)
class OverJumps(Transpose):
    """The transpose with what it lacks where steps go over jumps of the flow in the state.

    Args:
        shares: r by the number of the step: lam - r lam at its start (see `jumps`).
    """

    shares: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def _over(self) -> Mapping[int, Tensor]:
        return self.shares


@dataclass(frozen=True)
class StepAdjoint(Transpose):
    """The transpose of the accepted steps, replayed a few at a time; the default route.

    Exact for: the discretised flow, as `DirectAdjoint`. Memory: the kept steps and the graph of one
    chunk. Cost: one evaluation with a graph and one vector-Jacobian product for each evaluation of
    the accepted steps, or a recorded product alone where that saves work (see `staged`). Falls back
    to `InterpolatingAdjoint`, and says so in `result.stats`, where lam^T F departs from what it has
    to be.

    Args:
        chunk: Number of steps in one graph; None: 16 for small states, fewer for large ones.

    Raises:
        TypeError, ValueError: `chunk` is not a positive integer.
    """

    figures: ClassVar[tuple[str, ...]] = ("identity", "time_term")

    def vouches_for(self, path: Piece) -> tuple[str, ...]:
        """See `GradientRoute.vouches_for`.

        The transpose has the error of the steps, which its figures see by the steps' own estimates.
        Those of methods of low order are too small by far (a quarter of the gradient at rtol 1e-2
        to 1e-3 with fehlberg2, unseen): there the route is held against the continuous adjoint.
        """
        return self.figures if path.method.order >= _VOUCHED_ORDER else ()

    def _solve(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        pulled = super()._solve(path, jumps)
        if pulled.departure is None or pulled.departure <= path.call.promise:
            return pulled
        return _continuous(path, jumps, pulled.departure)


def _continuous(path: Piece, jumps: Sequence[Jump], departure: float) -> PullBack:
    """The continuous adjoint in the place of the transpose."""
    reason = (
        f"lam^T F departs from what it has to be by {departure:.1e} along the path: the steps are "
        "beyond the limit of stability, or over kinks, and their transpose is no adjoint there"
    )
    other = InterpolatingAdjoint().pull_back_path(path, jumps)
    return replace(other, route="InterpolatingAdjoint", fallback=reason)


class _Transpose:
    """lam on its way back through the steps, the sums that it leaves, and the identity."""

    def __init__(
        self, path: Piece, jumps: Sequence[Jump], recorded: Products | None = None
    ) -> None:
        self._path = path
        self._recorded = recorded
        self._jumps = jumps
        self._sweep = Sweep([torch.zeros_like(path.x0)], path.leaves.tensors)
        # Sums on the device: int lam^T F_t, what lam^T F has to be, and its error by the steps'.
        zero = path.x0.new_zeros(())
        self._time = self._expected = self._defect = zero
        self._gap = self._scale = self._received = zero
        # lam^T F at the latest jump on the way back, and int lam^T F_t from there on.
        self._anchor = self._since = zero
        # What lam and lam^T F would be without cancellation.
        self._largest = self._strength = zero
        self._masses: dict[float, Tensor] = {}
        self._products = 0

    @property
    def _lam(self) -> Tensor:
        return self._sweep.lam[0]

    def over_the_jump(self, node: int) -> None:
        """F_t has a point mass where the flow jumps."""
        before, after = self._path.steps[node - 1 : node + 1]
        mass = self._lam @ (after.f0 - before.f1)
        self._masses[after.t0] = mass
        self._time = self._time + mass
        self._anchor, self._since = self._lam @ before.f1, torch.zeros_like(self._since)

    def through(self, begin: int, end: int, share: Tensor | None = None) -> None:
        """Take lam from one node to another, with all that it receives at hits on the way.

        The steps of a hit branch off at their node: they are replayed in the same graph, where they
        share the first evaluation with the step of the path. Where the first step goes over a jump
        in the state, with the share r, lam - r lam arrives at its start.
        """
        steps = self._path.steps[begin:end]
        met = [
            jump
            for jump in self._jumps
            if begin <= jump.node < end or (jump.node == end and not jump.steps)
        ]
        if self._recorded is not None and not met:
            by_shift, inner = self._by_products(self._recorded, steps)
        elif self._recorded is not None and len(steps) > 1 and all(j.node == end for j in met):
            # A step that ends at a hit is as long as the polished T, its velocities are older.
            self.through(end - 1, end)
            self.through(begin, end - 1, share)
            return
        else:
            replayed = self._by_replay(steps, begin, met)
            if replayed is None:
                # Beyond the limit of stability a few steps amplify rounding: each has to arrive.
                middle = (begin + end) // 2
                self.through(middle, end)
                self.through(begin, middle, share)
                return
            by_shift, inner = replayed
        if share is not None:
            self._sweep.lam[0] = self._lam - share * self._lam
        self._time, self._since = self._time + by_shift, self._since + by_shift
        if any(jump.node < end for jump in met):
            self._anchor = self._lam @ steps[0].f0
            self._since = torch.zeros_like(by_shift)
        self._largest = torch.maximum(self._largest, torch.linalg.vector_norm(self._lam))
        errors = torch.stack([step.error for step in steps])
        self._defect = self._defect + (torch.stack(inner) * errors).sum()
        self._look(steps[0])

    def _by_products(
        self, recorded: Products, steps: Sequence[Step]
    ) -> tuple[Tensor, list[Tensor]]:
        """As `_by_replay`, by the kept velocities and recorded products."""
        inner, times, gained = [], [], []
        for step in reversed(steps):
            inner.append(self._lam)
            lam, time, leaves = recorded.transposed(step, self._lam)
            self._sweep.lam = [lam]
            times.append(time)
            gained.append(leaves)
        self._products += recorded.stages * len(steps)
        self._sweep.leave([torch.stack(parts).sum(0) for parts in zip(*gained, strict=True)])
        return torch.stack(times).sum(), inner[::-1]

    def _by_replay(
        self, steps: Sequence[Step], begin: int, met: Sequence[Jump]
    ) -> tuple[Tensor, list[Tensor]] | None:
        """What int lam^T F_t gains, and lam at the ends of the steps; None where these are missed.

        lam and the sums of the leaves move on.
        """
        path, first = self._path, steps[0]
        shift = path.x0.new_zeros(()).requires_grad_(True)
        x = first.y0.detach().requires_grad_(True)
        replay = _Replay(path, shift, first.t0, steps[-1].t1)
        evaluations = path.flow.calls
        with torch.enable_grad():
            states = replay.through(steps, x)
            ends, lams = [states[-1]], [self._lam]
            kept = [(steps[-1], states[-1])]
            for jump in met:
                state = states[jump.node - begin]
                if jump.steps:
                    state = replay.through(jump.steps, state)[-1]
                    kept.append((jump.steps[-1], state))
                ends.append(state)
                lams.append(jump.cotangent)
        self._products += path.flow.calls - evaluations
        if not self._arrive(steps, kept):
            return None
        for jump in met:
            self._gain(jump)
        where = f"by the flow between t = {first.t0:.6g} and {steps[-1].t1:.6g}"
        path.leaves.require_known(ends, inputs=(shift, x), where=where)
        self._sweep.lam = lams
        by_shift, *inner = self._sweep.through(
            ends, [x], [shift, *states[1:]], keep=path.leaves.has_history
        )
        return by_shift, inner

    def _arrive(self, steps: Sequence[Step], ends: Sequence[tuple[Step, Tensor]]) -> bool:
        """Whether a replay gives the kept ends again, to rounding; a single step has to.

        Raises:
            NotReproducibleError: The flow is another one by now.
        """
        gaps = torch.stack([(end.detach() - step.y1).abs().max() for step, end in ends])
        sizes = torch.stack(
            [steps[-1].y1.abs().max(), *(s.f0.abs().max() * s.length for s in steps)]
        )
        gap, size = torch.stack([gaps.max(), sizes.sum()]).tolist()
        arrives = gap <= 100 * torch.finfo(gaps.dtype).eps * size
        if not arrives and len(steps) == 1:
            arrives = gap <= 100 * self._moved_by_rounding(steps[0])
        if not arrives and len(steps) == 1:
            raise NotReproducibleError(
                f"replaying the steps from t = {steps[0].t0:.6g} does not give the state at t = "
                f"{steps[-1].t1:.6g} again (it is off by {gap:.2g}): the flow is not the function "
                "that it was in the forward run (a loop variable in a closure, a buffer of a "
                "module, hidden state), so its derivative would belong to another path."
            )
        return arrives

    def _moved_by_rounding(self, step: Step) -> float:
        """By how much the end of a step moves where its start moves by a rounding."""
        with torch.no_grad():
            flow = self._path.flow.on(self._path.number_at(step.t0))
            rounding = torch.finfo(step.y0.dtype).eps * noise_like(seed=4)(step.y0)
            ends = [
                self._path.method.trial(flow, step.t0, start, flow(step.t0, start), step.t1).y1
                for start in (step.y0, step.y0 + rounding * step.y0.abs().max())
            ]
            return float((ends[1] - ends[0]).abs().max())

    def _gain(self, jump: Jump) -> None:
        """What lam^T F has to be from here on, and the size of that."""
        products = jump.cotangent * jump.velocity
        self._largest = self._largest.clamp_min(jump.size)
        self._expected = self._expected + products.sum()
        if not jump.steps:
            self._anchor = self._lam @ jump.velocity + products.sum()
            self._since = torch.zeros_like(self._since)
        parts = jump.size * torch.linalg.vector_norm(jump.velocity)
        self._strength = torch.maximum(self._strength, parts)
        self._received = torch.maximum(self._received, parts)
        self._scale = torch.maximum(self._scale, self._received)

    def _look(self, step: Step) -> None:
        """The identity at the start of a step."""
        products = self._lam * step.f0
        residual = products.sum() + self._time - self._expected
        self._gap = torch.maximum(self._gap, residual.abs().nan_to_num(torch.inf))
        self._scale = torch.maximum(self._scale, products.abs().sum())

    def result(self) -> PullBack:
        """What has come back to t0."""
        at_start = self._anchor - self._since
        numbers = [self._time, self._defect, self._gap, self._scale, self._received, at_start]
        rates = torch.maximum(self._scale, self._strength)
        sizes = [self._largest, rates, *(size.to(at_start) for size in self._sweep.sizes)]
        figures: list[float] = torch.stack([*numbers, *sizes]).tolist()
        time, defect, gap, scale, received, rate, *natural = figures
        # Garbage is large: it must not be measured by itself.
        if gap > _GARBAGE * received:
            scale = received
        departure = 0.0 if gap == 0.0 else gap / scale if scale > 0 and isfinite(scale) else gap
        return PullBack(
            start=self._lam,
            leaves=self._sweep.sums,
            time=time,
            defect=defect,
            departure=departure,
            start_rate=rate,
            sizes=tuple(natural),
            masses={t: float(mass) for t, mass in self._masses.items()},
            vjps=self._products,
        )


class _Replay:
    """Steps of one smooth piece taken again in one graph, with all times shifted alike."""

    def __init__(self, path: Piece, shift: Tensor, begin: float, end: float) -> None:
        self._method = path.method
        self._shift = shift
        self._flow = path.flow.on(path.number_at(begin)).traced_between(begin, end)
        self._times: dict[float, Tensor] = {}
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def through(self, steps: Sequence[Step], start: Tensor) -> list[Tensor]:
        """The states at the nodes, the start among them."""
        states = [start]
        for step in steps:
            t0 = self._times.setdefault(step.t0, self._shift + step.t0)
            states.append(self._method.replay(self._function, step, states[-1], t0, step.length))
        return states

    def _function(self, t: Tensor, y: Tensor) -> Tensor:
        """The flow; once only at a time and state that two steps share."""
        key = (id(t), id(y))
        if key not in self._known:
            # The arguments are held, so that their addresses stay theirs.
            self._known[key] = (self._flow(t, y), t, y)
        return self._known[key][0]
