"""How a learned optimiser does on problems that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ode_stopping.core.validation import described, require_count

from .base import LearnedOptimizer
from .tasks import MetaTask
from .training.loss import Outcomes
from .training.rollout import Rollout

__all__ = ["Evaluation", "evaluate"]

_CHUNK = 50


@dataclass(frozen=True)
class Evaluation:
    """Runs on B problems with K targets each.

    Attributes:
        horizon: Steps of every run.
        outcomes: N, f there, rises, blow-ups.
        values: f(x_k), shape (horizon + 1, B).
        steps: |u_k| / |g_k| over each problem, the effective step size, shape (horizon, B).
    """

    horizon: int
    outcomes: Outcomes
    values: Tensor
    steps: Tensor

    @property
    def index(self) -> Tensor:
        """N with a miss as horizon + 1, shape (B, K)."""
        return self.outcomes.counted(self.horizon)

    @property
    def reached(self) -> Tensor:
        """Share of the problems that reached each target, shape (K,)."""
        return (self.outcomes.index >= 0).double().mean(0)

    def blown(self, factor: float = 10.0) -> float:
        """Share of the problems whose f was above so many times its lowest, or not finite."""
        return float(self.outcomes.blown(factor).double().mean())


@torch.no_grad()
def evaluate(learned: LearnedOptimizer, task: MetaTask, *, horizon: int) -> Evaluation:
    """Run an optimiser on problems, without gradients.

    Args:
        learned: The optimiser.
        task: The problems; all are run to the horizon, beyond their targets.
        horizon: Steps.

    Raises:
        TypeError, ValueError: `horizon` is not a positive integer; no optimiser or no task.
    """
    require_count(horizon, name="horizon")
    if not isinstance(learned, LearnedOptimizer):
        raise TypeError(f"learned must be a LearnedOptimizer; got {described(learned)}")
    if not isinstance(task, MetaTask):
        raise TypeError(f"task must be a MetaTask; got {described(task)}")
    rollout = Rollout(learned, task)
    values, steps = [rollout.value.unsqueeze(0)], []
    for begin in range(0, horizon, _CHUNK):
        stretch, _ = rollout.advance(min(_CHUNK, horizon - begin), keep=False)
        part = stretch.measured
        moved = torch.linalg.vector_norm(part.x[1:] - part.x[:-1], dim=-1)
        steps.append(moved / torch.linalg.vector_norm(stretch.fed, dim=-1))
        values.append(part.f[1:])
    return Evaluation(horizon, rollout.outcomes, torch.cat(values), torch.cat(steps))
