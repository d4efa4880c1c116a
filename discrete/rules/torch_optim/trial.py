"""A few steps of an optimiser on trial, before it is taken for an update rule.

What it keeps is found by looking; that nothing is missing is found by walking beside it; and that
its start has a derivative, by differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ode_stopping.core.consistency import check_derivatives
from ode_stopping.core.leaves import LeafSet
from ode_stopping.core.states import StateLayout
from ode_stopping.core.status import MissingGradientError
from ode_stopping.core.validation import described

__all__ = ["OptimizerWalk", "check_first_step", "require_same_steps", "walk_with"]

_STEPS = 3

# Of the way that was gone: numbers that torch keeps in single precision may differ, a state that
# was forgotten differs by more.
_SAME = 1e-4

_POINTS = 3

_NEARBY = 1e-2

Update = Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class OptimizerWalk:
    """What was seen of an optimiser's own run.

    Attributes:
        buffers: What it keeps for its parameter after the steps, by name.
        counter: The step counter as it keeps it: a tensor, a number, or None.
        positions: Where it was after each step.
    """

    buffers: dict[str, Tensor]
    counter: Any
    positions: list[Tensor]


def walk_with(
    make: Callable[[list[Tensor]], Optimizer],
    kept: Callable[[Optimizer, Tensor], dict[str, Any]],
    gradient: Callable[[Tensor], Tensor],
    x: Tensor,
) -> OptimizerWalk:
    """Three steps of the optimiser itself.

    Args:
        make: Parameters -> the optimiser.
        kept: Optimiser and parameter -> what it keeps for it, without the step counter.
        gradient: x -> grad f(x).
        x: The start; a copy is walked with.

    Raises:
        TypeError: It needs a closure, keeps something that is no floating-point tensor, counts
            steps in its own way, or changes its parameter group.
    """
    parameter = nn.Parameter(x.clone())
    optimizer = make([parameter])
    name, step = type(optimizer).__name__, cast("Callable[[], Any]", optimizer.step)
    before, positions, counter = _numbers(optimizer), [], None
    for k in range(_STEPS):
        parameter.grad = gradient(parameter.detach()).clone()
        try:
            step()
        except TypeError as error:
            if "closure" not in str(error):
                raise
            raise TypeError(f"{name} cannot be an update: its step needs a closure") from error
        positions.append(parameter.detach().clone())
        counter = optimizer.state.get(parameter, {}).get("step")
        for key, entry in kept(optimizer, parameter).items():
            if not isinstance(entry, Tensor) or not entry.is_floating_point():
                raise TypeError(
                    f"{name} cannot be an update: it keeps {key} ({described(entry)}) in its "
                    "state, which is no floating-point tensor and has no derivative"
                )
        if (counter is not None and float(counter) != k + 1) or _numbers(optimizer) != before:
            raise TypeError(
                f"{name} cannot be an update: it changes its parameter group, or counts steps in "
                "its own way. What it remembers has to be in its state, and the number of steps "
                "under 'step' there"
            )
    return OptimizerWalk(kept(optimizer, parameter), counter, positions)


def _numbers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups without the parameters."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def require_same_steps(
    update: Update, state: tuple[Tensor, ...], walk: OptimizerWalk, *, name: str
) -> None:
    """The update has to go where the optimiser went.

    Raises:
        TypeError: It does not, so the optimiser remembers something outside of its state.
    """
    start = state[0]
    for k, position in enumerate(walk.positions):
        state = update(k, state)
        there = position.reshape(start.shape)
        gap = (state[0] - there).abs().max()
        # Not so where the run has left the numbers: that is for its status to say.
        if bool(gap > _SAME * (there - start).abs().max()):
            raise TypeError(
                f"{name} cannot be an update: with the state that it keeps for its parameter, its "
                f"step {k} goes elsewhere than in a run of its own (by {float(gap):.3g}), so it "
                "remembers something outside of it"
            )


def check_first_step(update: nn.Module, state: tuple[Tensor, ...], *, name: str) -> None:
    """Compare the derivative of step 0, where an optimiser starts, with differences.

    `stopping_index` looks at its own first and last step; here a kink at the start is told from a
    lost derivative by points nearby, and the optimiser is named.

    Raises:
        MissingGradientError: It is wrong or missing.
    """
    layout = StateLayout.of(state)
    flat, leaves = layout.pack(state).detach(), LeafSet.collect(update)

    def following(y: Tensor) -> Tensor:
        return layout.pack(update(0, layout.unpack(y)))

    def plain(y: Tensor) -> Tensor:
        with torch.no_grad():
            return following(y)

    seen = []
    for _ in range(2):
        point = flat.clone().requires_grad_(True)
        seen.append(leaves.add_from([following(point)], inputs=[point]))
    leaves.note_history(*seen)
    if not (leaves.tensors or state[0].requires_grad):
        return
    generator = torch.Generator().manual_seed(0)
    for attempt in range(_POINTS):
        noise = torch.randn(flat.shape, generator=generator, dtype=torch.float64).to(flat)
        point = flat + _NEARBY * attempt * flat.square().mean().sqrt() * noise
        try:
            check_derivatives(plain, following, point, leaves, name="update", layout=layout)
            return
        except MissingGradientError as error:
            # A kink of f, or of a root, can be to blame at one point, but not at all of them.
            if attempt + 1 == _POINTS:
                raise MissingGradientError(
                    f"step 0 of {name}: {error} It may also be code outside of torch in the "
                    "optimiser (math.sqrt, NumPy): then give the hyperparameter as a number"
                ) from error
