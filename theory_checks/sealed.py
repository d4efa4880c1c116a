"""Stored results as strict JSON with a format, a version and a checksum.

Nothing in such a file is ever executed or imported: no pickles. A folder of results may come from
anywhere, and what is not as this module writes it is named and computed anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NoReturn

from .files import write_atomically

VERSION = 1
_LONGEST_INTEGER = 300  # digits; longer ones are no float, and slow to print
_FIELDS = {"format", "version", "sha256", "content"}


class ForeignError(Exception):
    """A stored file that is not as this version writes it; the message says in what."""


def dump(content: Any) -> bytes:
    """`content` as strict, readable JSON."""
    return (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_sealed(path: Path, kind: str, content: Any) -> None:
    """Store `content`, which has to be strict JSON, as a file of the format `kind`.

    Raises:
        WriteError: See `files.write_atomically`.
        ValueError: A number or a text that strict JSON cannot hold.
    """
    sealed = {"format": kind, "version": VERSION, "sha256": _checksum(content), "content": content}
    write_atomically(path, dump(sealed))


def read_sealed(path: Path, kind: str) -> Any:
    """The content of a file of the format `kind`; None where there is no file.

    Raises:
        ForeignError: Anything else; the message begins with the file's name.
    """
    try:
        if not path.is_file():  # a named pipe would be waited for
            if path.exists() or path.is_symlink():
                raise ForeignError(f"{path.name} is not a file")
            return None
        text = path.read_text(encoding="utf-8")
        sealed = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, parse_int=_not_too_long
        )
        if not isinstance(sealed, dict) or sealed.get("format") != kind:
            raise ForeignError(f"{path.name} is not a file of the format {kind!r}")
        if type(sealed.get("version")) is not int or sealed["version"] != VERSION:
            raise ForeignError(f"{path.name} has another version than {VERSION} of its format")
        if set(sealed) != _FIELDS or sealed["sha256"] != _checksum(sealed["content"]):
            raise ForeignError(f"{path.name} differs from its checksum")
        if sealed["content"] is None:
            raise ForeignError(f"{path.name} is empty")
    except OSError as error:
        raise ForeignError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ForeignError(f"{path.name} is not strict JSON") from error
    return sealed["content"]


def _checksum(content: Any) -> str:
    """Of one canonical text of the content; a text is no UTF-8 where it has lone surrogates."""
    text = json.dumps(
        content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse(token: str) -> NoReturn:
    """For NaN, Infinity and -Infinity, which Python's JSON would let pass."""
    raise ValueError(f"{token} is not JSON")


def _finite(token: str) -> float:
    """A float, unless it overflows."""
    value = float(token)
    if not math.isfinite(value):
        raise ValueError(f"{token[:40]} overflows")
    return value


def _not_too_long(token: str) -> int:
    """An integer of a sensible length."""
    if len(token) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(token)} digits")
    return int(token)
