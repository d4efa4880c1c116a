"""A meta-training in a file, from which it goes on bit by bit.

One safetensors file holds the tensors and, in its header, everything else as JSON; it is written
under another name, forced to the disk and renamed, so that a kill leaves the old one or the new
one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_tensors, write_tensors

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]

_FORMAT = "ode-stopping meta-training 1"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training between two steps.

    Attributes:
        tensors: By name.
        numbers: JSON: step, records, counters.
        settings: What must not change: JSON.
    """

    tensors: Mapping[str, Tensor]
    numbers: dict[str, Any]
    settings: dict[str, Any]


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write it, whole or not at all."""
    about = {
        "format": _FORMAT,
        "numbers": json.dumps(checkpoint.numbers),
        "settings": json.dumps(checkpoint.settings),
    }
    write_tensors(checkpoint.tensors, about, path)


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    """Read one; None where there is none.

    Raises:
        ValueError: No checkpoint, or one of a training with other settings.
    """
    if not path.exists():
        return None
    tensors, about = read_tensors(path)
    if about.get("format") != _FORMAT:
        raise ValueError(f"{path.name} holds no meta-training")
    stored: dict[str, Any] = json.loads(about["settings"])
    wanted: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    changed = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
    if changed:
        was = ", ".join(f"{n} = {stored.get(n)!r} (now {wanted.get(n)!r})" for n in sorted(changed))
        raise ValueError(
            f"{path.name} is of a training with other settings: {was}. Take another file, or those "
            "settings"
        )
    return Checkpoint(tensors, json.loads(about["numbers"]), stored)
