"""Files that appear whole or not at all, and what a command says where one cannot be written."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ode_stopping.core.files import replace_file

UNWRITABLE = 3  # the exit status of a command that could not write what it was to write
# What only writing meets; other errors may be about a file that is read.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# As much as one block of common file systems: an empty file fits on a full disk.
_PROBE = bytes(4096)


class WriteError(Exception):
    """A file or folder that cannot be written.

    No OSError, so that code which handles errors of reading does not take it for one of those.

    Attributes:
        path: The file or folder.
        reason: Why, in the words of the operating system.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both, for copies that cross a process's border
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot write {self.path}: {self.reason}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either its old or its new content, never half of it.

    Raises:
        WriteError: A full disk, a folder that may not be written, and the like. No part of a file
            is left.
    """
    try:
        # (Not forced to the disk: what a machine that goes down takes with it is computed anew.)
        replace_file(path, content, durable=False)
    except OSError as error:
        raise WriteError(path, _reason(error)) from error


def require_writable(folder: Path) -> None:
    """Make `folder` where it is missing, and write a file into it on trial.

    Raises:
        WriteError: It cannot be made, or takes no file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(_PROBE)
    except OSError as error:
        raise WriteError(folder, _reason(error)) from error


def require_output(path: Path) -> None:
    """See, before hours of work, that `write_text` will be able to write this file.

    Raises:
        WriteError: It is a folder, or its folder cannot be made or takes no file.
    """
    if path.is_dir():
        raise WriteError(path, "it is a folder")
    if not _is_device(path):
        require_writable(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write what a script has found; where that fails, print it, for it may have taken hours.

    Raises:
        WriteError: As in `write_atomically`, once the text stands on standard output.
    """
    try:
        if _is_device(path):  # /dev/stdout, say, which must not be replaced by a file
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(path.resolve(), text.encode())
    except (WriteError, OSError) as error:
        print(text, flush=True)
        reason = error.reason if isinstance(error, WriteError) else _reason(error)
        raise WriteError(path, f"{reason}; its text is printed instead") from error


def _is_device(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def inside(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, lies below `folder`."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links; a name no system has
        return False


def run_script(main: Callable[[], object]) -> NoReturn:
    """Call the `main` of a command and exit; 3, with a sentence, where something was not written.

    Covered are `WriteError`, and a disk that is full or may not be written, under standard output
    as well; any other error is passed on.

    Raises:
        SystemExit: 0, or the status of the SystemExit that `main` raised, or 3.
    """
    status: str | int | None = 0
    try:
        try:
            main()
        except SystemExit as ending:
            status = ending.code
        sys.stdout.flush()
    except WriteError as error:
        _leave(str(error))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _leave(f"cannot write {error.filename or 'to standard output'}: {_reason(error)}")
    raise SystemExit(status)


def _leave(sentence: str) -> NoReturn:
    """Say it and exit with status 3."""
    print(sentence, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more when it ends, and would print a traceback over that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(UNWRITABLE)


def _reason(error: OSError) -> str:
    """The system's words, without the number and the name of a temporary file."""
    return error.strerror or str(error) or type(error).__name__
