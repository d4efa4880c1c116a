"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that its name stands for the old content or the new, never for half of it.

    The content is written under another name in the same folder, which is made where it is
    missing, and renamed. Where that fails, no part of a file is left.

    Args:
        path: The file.
        content: What it is to hold.
        durable: Whether the content is forced to the disk before it takes the name, so that it is
            whole after the machine itself has gone down.

    Raises:
        OSError: It cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
        raise
