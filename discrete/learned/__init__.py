"""Learned optimisers: update rules with parameters, trained to reach a target soonest."""

from .base import LearnedOptimizer, LearnedUpdate
from .direct import LearnedPreconditioner, LearnedSchedule
from .evaluation import Evaluation, evaluate
from .lstm import CoordinateLSTM, RNNprop
from .tasks import MetaTask
from .torch_optim import LearnedTorchOptimizer
from .training import MetaHistory, MetaLoss, MetaRecord, meta_train

__all__ = [
    "CoordinateLSTM",
    "Evaluation",
    "LearnedOptimizer",
    "LearnedPreconditioner",
    "LearnedSchedule",
    "LearnedTorchOptimizer",
    "LearnedUpdate",
    "MetaHistory",
    "MetaLoss",
    "MetaRecord",
    "MetaTask",
    "RNNprop",
    "evaluate",
    "meta_train",
]
