"""The LIBSVM sets a1a, a2a, a3a and w3a, from files of one's own or fetched on request.

They are not part of the project. A folder holds them, each under its plain name, and is named by
the argument `folder` or by the environment variable ODE_STOPPING_DATA.
"""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from ..core.validation import described, require_flag

ADDRESS = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"
VARIABLE = "ODE_STOPPING_DATA"
TIMEOUT = 30.0  # seconds without an answer; the largest file has 0.35 MB
LARGEST_FILE = 2**26  # bytes of text that are read
LARGEST_X = 2**27  # numbers in X, which is dense: 1 GiB in float64
# A number in decimal notation; Python's float() would take nan, inf and 1_0 as well.
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Eighteen digits: far beyond every size, and int() is quick.
_INDEX = re.compile(rb"[0-9]{1,18}")
# Checksums of the plain text; the order is that of `available_libsvm`.
SHA256 = {
    "a1a": "eb54c45f1bdb51286f803dd092eb8202b44637a858fc6c4e533a2d64a0d94b4e",
    "a2a": "535782f1be62e60938d8accb1573043542b3ac11265522927574dcbb28360a2f",
    "a3a": "2d513572f103d25e84bebe4b9f2f52ee9445764b5a393caff7db9c482cfc1ee4",
    "w3a": "f050c32d3bd2f18eccbe3847cfe8a3ba9dae4de67d73236013c4a7b9afb48cc7",
}


def libsvm(
    name: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    download: bool = False,
    verify: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """One of the LIBSVM sets a1a, a2a, a3a, w3a as (X, y), labels -1 and +1.

    X is dense, of shape (n, features), and y has shape (n,):

        a1a 1605 x 119,   a2a 2265 x 119,   a3a 3185 x 122,   w3a 4912 x 300.

    There are as many columns as the largest index in the file; the a sets are said to have 123
    features, and the last ones occur in no row of these files. 408 rows of w3a have no feature at
    all and are rows of zeros.

    Source: the page https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html. The a sets
    derive from UCI's Adult data; the w sets are from Platt, "Fast training of support vector
    machines using sequential minimal optimization" (1998).

    Args:
        name: "a1a", "a2a", "a3a" or "w3a", also the name of the file.
        folder: Where the file is; default the folder that the environment variable
            ODE_STOPPING_DATA names. The empty string counts as not given, in both.
        download: Fetch a file that is not there into the folder, which is made if it is missing.
            A file that is there is never fetched again nor replaced.
        verify: Compare the file's sha256 with the known one. Copies of mirrors may differ in line
            ends, blanks and the like, and be as good: for those, and for files of your own, False.
            This holds for a download as well.
        dtype: Of both tensors; a floating type.

    Raises:
        ValueError: Another name; a checksum that differs; download=True without a folder. By its
            line, what is not svmlight text with labels -1 and +1 and ascending indices from 1: a
            qid, a value that is no decimal number (nan, inf) or beyond what `dtype` holds, and an
            index at which X would have more than 2^27 numbers. A file of more than 2^26 bytes.
        FileNotFoundError: The file is not there, and download=False.
        ConnectionError: The download failed. Whatever fails, no file is left behind.
        OSError: The file cannot be read, or a download not be stored.
        TypeError: `download` or `verify` is neither True nor False; `dtype` is no floating type.
    """
    if name not in tuple(SHA256):
        raise ValueError(f"name must be one of {', '.join(SHA256)}; got {name!r}")
    require_flag(download, name="download")
    require_flag(verify, name="verify")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating type of torch; got {described(dtype)}")
    place = _place(folder)
    if place is None and download:
        raise ValueError(
            f"download=True needs a folder to put {name} into: pass folder=, or name one in the "
            f"environment variable {VARIABLE}"
        )
    path = None if place is None else place / name
    if path is not None and path.is_file():
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        return _read(content, name=name, origin=str(path), verify=verify, dtype=dtype)
    if path is None or not download:
        looked = "no folder is named" if place is None else f"there is no {name} in {place}"
        raise FileNotFoundError(
            f"{looked}: pass the folder of the file as folder=, or name it in the environment "
            f"variable {VARIABLE}. download=True fetches the file; its address is {ADDRESS}{name}"
        )
    content = _fetch(name, path)
    data = _read(content, name=name, origin=ADDRESS + name, verify=verify, dtype=dtype)
    _store(content, path)  # only now: what was not as it should be is not kept
    return data


def available_libsvm(folder: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """Which of a1a, a2a, a3a and w3a there are, in that order; whether they are intact is not read.

    Args:
        folder: As for `libsvm`. Without one, and where it does not exist, there are none.
    """
    place = _place(folder)
    return () if place is None else tuple(name for name in SHA256 if (place / name).is_file())


def _place(folder: str | os.PathLike[str] | None) -> Path | None:
    """The folder that was named, or None."""
    named = folder or os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else None


def _read(
    content: bytes, *, name: str, origin: str, verify: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(X, y) of a file's bytes, those that were compared with the checksum."""
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{origin} has more than {LARGEST_FILE} bytes, the most that are read")
    got = hashlib.sha256(content).hexdigest()
    if verify and got != SHA256[name]:
        raise ValueError(
            f"{origin} is not the known file {name}: its sha256 is {got}, that of {name} is "
            f"{SHA256[name]}. Delete a damaged copy and get another one (download=True, or "
            f"{ADDRESS}{name}); for a copy that you trust, verify=False reads it all the same"
        )
    return _parsed(content, f"{origin} is not svmlight text as it should be: ", dtype)


def _parsed(content: bytes, complaint: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(X, y) of svmlight text.

    Raises:
        ValueError: `complaint`, with the number of the line and what is wrong with it.
    """
    labels: list[float] = []
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    widest = (0, 0)  # the largest index, and its line
    largest = torch.finfo(dtype).max
    for number, line in enumerate(content.split(b"\n"), start=1):
        label, *features = line.partition(b"#")[0].split() or [b""]
        if not label:
            continue
        try:
            labels.append(_label(label))
            previous = 0
            for feature in features:
                previous, value = _feature(feature, previous, largest)
                rows.append(len(labels) - 1)
                columns.append(previous - 1)
                values.append(value)
        except ValueError as error:
            raise ValueError(f"{complaint}line {number}, {error}") from None
        if previous > widest[0]:
            widest = (previous, number)
    if not labels:
        raise ValueError(f"{complaint}it has no rows")
    width, line_of_width = widest
    if len(labels) * width > LARGEST_X:
        raise ValueError(
            f"{complaint}line {line_of_width}, index {width} makes X, which is dense, "
            f"{len(labels)} x {width} ({len(labels) * width * dtype.itemsize / 2**30:.3g} GiB); at "
            f"most {LARGEST_X} numbers are held ({LARGEST_X * dtype.itemsize / 2**30:g} GiB)"
        )
    X = torch.zeros(len(labels), width, dtype=torch.float64)
    X[rows, columns] = torch.tensor(values, dtype=torch.float64)
    return X.to(dtype), torch.tensor(labels, dtype=dtype)


def _label(text: bytes) -> float:
    """-1.0 or 1.0.

    Raises:
        ValueError: Anything else.
    """
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if abs(value) != 1.0:
        raise ValueError(f"label {_shown(text)}: must be -1 or +1")
    return value


def _feature(text: bytes, previous: int, largest: float) -> tuple[int, float]:
    """Index and value of a feature.

    Args:
        text: As in 3:0.5.
        previous: The index before it in the row; 0 where it is the first.
        largest: What the type of X holds.

    Raises:
        ValueError: Not of that form, a qid, an index that is not above the one before, or a value
            that is no finite number of the type.
    """
    index, colon, number = text.partition(b":")
    if index == b"qid":
        raise ValueError(f"feature {_shown(text)}: query ids (qid), of ranking data, are not read")
    if not colon or not _INDEX.fullmatch(index) or not number:
        raise ValueError(
            f"feature {_shown(text)}: must be index:value, with an index of at most 18 digits"
        )
    if int(index) <= previous:
        rule = "indices start from 1" if previous == 0 else f"must be above {previous} before it"
        raise ValueError(f"feature {_shown(text)}: {rule}")
    value = float(number) if _NUMBER.fullmatch(number) else math.nan
    if math.isnan(value):
        raise ValueError(f"feature {_shown(text)}: its value is no finite number in decimals")
    if abs(value) > largest:
        raise ValueError(f"feature {_shown(text)}: its value is beyond {largest:.4g}, the largest")
    return int(index), value


def _shown(text: bytes) -> str:
    """A piece of a file in a message: short, and without what a terminal could take for orders."""
    short = text if len(text) <= 40 else text[:37] + b"..."
    return ascii(short.decode("latin-1"))


def _fetch(name: str, path: Path) -> bytes:
    """What the address answers; `path` is named in the error only."""
    address = ADDRESS + name
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            content: bytes = answer.read(LARGEST_FILE + 1)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise ConnectionError(
            f"{address} could not be fetched ({error}). Try again later, or get the file by other "
            f"means and put it there by hand: {path}"
        ) from error
    return content


def _store(content: bytes, path: Path) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder within the folder: os.replace is atomic inside of one file system only, and a file
    # written here has the usual permissions, unlike one that tempfile makes.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as unfinished:
        temporary = Path(unfinished) / path.name
        temporary.write_bytes(content)
        os.replace(temporary, path)
