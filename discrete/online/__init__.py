"""Optimisers that tune their hyperparameters while they run, by their own stopping index.

`AdamOLA` and `SGDOLA` are plain `torch.optim.Optimizer`s; `OnlineAdaptation` is what they are made
of, and `AdamHD` (hypergradient descent) the rival beside them.
"""

from .adam import AdamOLA
from .base import OnlineAdaptation
from .bundles import Moved
from .history import AdaptationHistory
from .hypergradient import AdamHD
from .options import AdaptationOptions
from .sgd import SGDOLA

__all__ = [
    "SGDOLA",
    "AdamHD",
    "AdamOLA",
    "AdaptationHistory",
    "AdaptationOptions",
    "Moved",
    "OnlineAdaptation",
]
