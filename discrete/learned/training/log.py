"""What a meta-training tells: lines on the terminal, JSON lines, and events for TensorBoard."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .history import MetaHistory, MetaRecord

__all__ = ["Log"]


class Log:
    """Where records go. After a restart the file goes on behind the records that are known.

    Args:
        file: JSON lines; None: nowhere.
        tensorboard: A folder; None: nowhere.
        progress: Whether to print, or what to call.
        of: The history so far.
        first: Whether this process is the one that tells.
    """

    def __init__(
        self,
        file: str | Path | None,
        tensorboard: str | Path | None,
        progress: bool | Callable[[MetaRecord], None],
        *,
        of: MetaHistory,
        first: bool,
    ) -> None:
        self._file = Path(file) if file is not None and first else None
        self._progress = progress if first else False
        self._known = len(of)
        self._history = of
        self._events: Any = None
        if tensorboard is not None and first:
            self._events = _writer(tensorboard, self._known)

    def __enter__(self) -> Self:
        if self._file is not None:
            lines = [json.dumps(record.to_dict()) for record in self._history.records]
            self._file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._events is not None:
            self._events.close()

    def record(self, record: MetaRecord, steps: int) -> None:
        """One step of so many."""
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record.to_dict()) + "\n")
        if self._events is not None:
            for name, value in record.to_dict().items():
                if value is not None and name != "step":
                    self._events.add_scalar(name, value, record.step)
        if callable(self._progress):
            self._progress(record)
        elif self._progress:
            recent = self._history.records[-20:]
            left = (steps - record.step - 1) * sum(r.seconds for r in recent) / len(recent)
            print(
                f"step {record.step + 1}/{steps}: loss {record.loss:.4g}, "
                f"{100 * record.reached:.0f} % reached, mean index {record.index:.4g}, "
                f"{left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def _writer(folder: str | Path, known: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard= needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=known)
