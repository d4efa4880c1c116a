"""Does the criterion have a derivative where each sample met its target? See `smoothness`.

All samples in the same evaluations, which have one time: that of the end of the run. So a jump or a
kink of J in the state is seen, one in time alone is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..iterating.batch import BatchRun
from .smoothness import AGREEMENT, JUMP, KINK, REACH, Smoothness

__all__ = ["look_at_criteria"]


def look_at_criteria(run: BatchRun, solved: Tensor) -> Tensor:
    """Warn of targets at which J leaves the derivative in doubt.

    Args:
        run: The forward run.
        solved: The targets to look at, shape (B, K).

    Returns:
        Where it has none (J is piecewise constant), shape (B, K).
    """
    refused = torch.zeros_like(run.samples.met)
    for place in range(refused.shape[1]):
        jumps, flat, kink = _looked_at(run, place, solved[:, place])
        refused[:, place] = jumps & flat
        for mask, seen in (
            (jumps & ~flat, Smoothness(jumps=True)),
            (flat & ~jumps, Smoothness(flat=True)),
            (kink, Smoothness(kink=True)),
        ):
            some = mask.nonzero()[:, 0].tolist()
            if some:
                others = f" and {len(some) - 1} others" if len(some) > 1 else ""
                n = int(run.samples.index[some[0], place])
                seen.warn(n, f"sample {some[0]}{others}: ")
    return refused


def _looked_at(run: BatchRun, place: int, solved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether J jumps, is flat at x_N, has a kink there: each shape (B,)."""
    call, samples, t = run.call, run.samples, run.call.update.clock.time(run.index)
    criterion = call.criterion
    previous = torch.where(solved[:, None], samples.previous[:, place], call.begin)
    state = torch.where(solved[:, None], samples.state[:, place], call.begin)
    step = state - previous
    here, slope_here = criterion.row_gradients(t, state)
    there, slope_there = criterion.row_gradients(t, previous)
    after, before = _along(slope_here, step), _along(slope_there, step)
    decrease, size = here - there, here.abs() + there.abs()
    eps = torch.finfo(state.dtype).eps
    noise = 1e3 * eps * size
    gap = (0.5 * (before + after) - decrease).abs()
    doubtful = solved & (gap > AGREEMENT * decrease.abs() + noise)
    jumps = torch.zeros_like(solved)
    if bool(doubtful.any()):

        def losses(s: Tensor) -> Tensor:
            return criterion.row_values(t, previous + s[:, None].to(step.dtype) * step)

        change, width = _concentrated(losses, there, here, eps)
        share = max(JUMP, 100 * width)
        jumps = doubtful & (change.abs() > share * decrease.abs() + noise)
    flat = solved & (samples.decrease[:, place] != 0) & (slope_here == 0).all(dim=1)
    if bool(flat.any()):
        flat = flat & ~_moves_otherwise(run, t, state, flat)
    kink = solved & ~(jumps | flat) & _has_kink(run, t, state, step, here)
    return jumps, flat, kink


def _along(gradients: Tensor, step: Tensor) -> Tensor:
    return (gradients.double() * step.double()).sum(dim=1)


def _moves_otherwise(run: BatchRun, t: float, state: Tensor, flat: Tensor) -> Tensor:
    """Whether J of those that are flat in x has a derivative to t or to a leaf: shape ()."""
    criterion, leaves = run.call.criterion, run.call.leaves
    time, point = criterion.inputs(t, state)
    value = criterion.traced(time, point)
    if not value.requires_grad:
        return torch.zeros_like(flat[0])
    grads = torch.autograd.grad(
        value, [time, *leaves.tensors], flat.to(value.dtype), allow_unused=True, retain_graph=True
    )
    some = [(gradient.nan_to_num() != 0).any() for gradient in grads if gradient is not None]
    return torch.stack(some).any() if some else torch.zeros_like(flat[0])


def _concentrated(
    losses: Callable[[Tensor], Tensor], at_low: Tensor, at_high: Tensor, eps: float
) -> tuple[Tensor, float]:
    """The change of J over the smallest piece of the last step with most of it, and its width."""
    low, width = torch.zeros_like(at_low), 1.0
    while width > max(1e4 * eps, 1e-9):
        width *= 0.5
        at_middle = losses(low + width)
        first = (at_middle - at_low).abs() >= (at_high - at_middle).abs()
        low = torch.where(first, low, low + width)
        at_low = torch.where(first, at_low, at_middle)
        at_high = torch.where(first, at_middle, at_high)
    return at_high - at_low, width


def _has_kink(run: BatchRun, t: float, state: Tensor, step: Tensor, here: Tensor) -> Tensor:
    """Whether the one-sided slopes at x_N differ, along a random mixture of what moves."""
    criterion, layout = run.call.criterion, run.call.layout
    generator = torch.Generator().manual_seed(0)
    # One mixture for all, so that a sample is judged as it is by itself.
    noise = torch.randn(sum(layout.sizes), generator=generator, dtype=torch.float64).to(step)
    direction, reach = step * noise, REACH
    eps = torch.finfo(state.dtype).eps
    differs, gaps = torch.ones_like(here, dtype=torch.bool), []
    for _ in range(2):
        ahead = (criterion.row_values(t, state + reach * direction) - here) / reach
        behind = (here - criterion.row_values(t, state - reach * direction)) / reach
        rounding = 100 * eps * here.abs() / reach
        gaps.append((ahead - behind).abs())
        scale = torch.maximum(ahead.abs(), behind.abs())
        differs = differs & (gaps[-1] > KINK * scale + rounding)
        if not bool(differs.any()):
            return differs
        reach /= 16
    return differs & (gaps[1] > 0.5 * gaps[0])
