"""Meta-training: a learned optimiser is trained on batches of problems."""

from .history import MetaHistory, MetaRecord
from .loop import meta_train
from .loss import MetaLoss

__all__ = ["MetaHistory", "MetaLoss", "MetaRecord", "meta_train"]
