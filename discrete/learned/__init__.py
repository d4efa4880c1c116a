"""Learned optimisers: update rules with parameters, trained to reach a target soonest."""

from .base import LearnedOptimizer, LearnedUpdate
from .direct import LearnedPreconditioner, LearnedSchedule
from .lstm import CoordinateLSTM, RNNprop
from .torch_optim import LearnedTorchOptimizer

__all__ = [
    "CoordinateLSTM",
    "LearnedOptimizer",
    "LearnedPreconditioner",
    "LearnedSchedule",
    "LearnedTorchOptimizer",
    "LearnedUpdate",
    "RNNprop",
]
