"""Tuning by descending the stopping time: its tasks, its loop, its history.

The loop knows nothing of flows or iterations. A `TuningTask` runs and says which number of its
result is to become small; `StoppingTask` is the one of this package, and `discrete` has another.
"""

from .history import Best, TuningError, TuningHistory, TuningRecord
from .loop import minimise
from .options import TuningOptions
from .tasks import StoppingTask, TuningTask
from .times import minimise_stopping_time

__all__ = [
    "Best",
    "StoppingTask",
    "TuningError",
    "TuningHistory",
    "TuningOptions",
    "TuningRecord",
    "TuningTask",
    "minimise",
    "minimise_stopping_time",
]
