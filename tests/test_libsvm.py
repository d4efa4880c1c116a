"""The LIBSVM sets: where files are looked for, what is checked, and what a download leaves."""

from __future__ import annotations

import hashlib
import http.client
import importlib
import io
import os
import sys
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import pytest
import torch

from ode_stopping.problems import LogisticRegression, available_libsvm, libsvm

# The package exports the function under the module's name.
MODULE = importlib.import_module("ode_stopping.problems.libsvm")
REAL = os.environ.get("ODE_STOPPING_DATA")
# A blank at the end of a row, a row without features, columns 3 and 4 in one row or in none.
TOY = b"-1 1:1 3:0.5 \n+1 2:1\n-1 \n+1 1:2 5:0.1\n"
OTHER = b"+1 1:1\n-1\n"
X_TOY = [[1, 0, 0.5, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [2, 0, 0, 0, 0.1]]
Y_TOY = [-1, 1, -1, 1]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small files are the known ones; nothing is named by the environment or fetched."""
    known = {"toy": hashlib.sha256(TOY), "other": hashlib.sha256(OTHER)}
    monkeypatch.setattr(MODULE, "SHA256", {name: s.hexdigest() for name, s in known.items()})
    monkeypatch.setattr(MODULE, "ADDRESS", "file:///nowhere/at/all/")
    monkeypatch.delenv("ODE_STOPPING_DATA", raising=False)


@pytest.fixture
def needs_sklearn() -> None:
    pytest.importorskip("sklearn")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with both files."""
    (tmp_path / "toy").write_bytes(TOY)
    (tmp_path / "other").write_bytes(OTHER)
    return tmp_path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the server."""
    served = tmp_path / "server"
    served.mkdir()
    (served / "toy").write_bytes(TOY)
    monkeypatch.setattr(MODULE, "ADDRESS", served.as_uri() + "/")
    return served


@pytest.mark.usefixtures("needs_sklearn")
def test_rows_and_labels(folder: Path) -> None:
    X, y = libsvm("toy", folder=folder)
    assert X.dtype == y.dtype == torch.float64
    assert X.layout == torch.strided
    assert torch.equal(X, torch.tensor(X_TOY, dtype=torch.float64))  # the third row is empty
    assert torch.equal(y, torch.tensor(Y_TOY, dtype=torch.float64))
    assert LogisticRegression(X, y).dim == 5


@pytest.mark.usefixtures("needs_sklearn")
def test_dtype(folder: Path) -> None:
    X, y = libsvm("toy", folder=folder, dtype=torch.float32)
    assert X.dtype == y.dtype == torch.float32
    assert torch.equal(X, torch.tensor(X_TOY, dtype=torch.float32))
    assert y.tolist() == Y_TOY


@pytest.mark.usefixtures("needs_sklearn")
def test_found_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODE_STOPPING_DATA", str(folder))
    assert libsvm("toy")[0].shape == (4, 5)
    assert libsvm("toy", folder="")[0].shape == (4, 5)
    (folder / "inner").mkdir()
    with pytest.raises(FileNotFoundError, match="inner"):  # the argument goes first
        libsvm("toy", folder=folder / "inner")


@pytest.mark.usefixtures("needs_sklearn")
def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert libsvm("toy", folder="~")[0].shape == (4, 5)


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        libsvm("toy", folder=tmp_path)
    for part in (
        f"there is no toy in {tmp_path}",
        "folder=",
        "ODE_STOPPING_DATA",
        "download=True",
        "file:///nowhere/at/all/toy",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [None, ""])
def test_no_folder_named(value: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # the empty string does not mean this one
    if value is not None:
        monkeypatch.setenv("ODE_STOPPING_DATA", value)
    with pytest.raises(FileNotFoundError, match=r"no folder is named: .*ODE_STOPPING_DATA"):
        libsvm("toy")
    with pytest.raises(ValueError, match=r"download=True needs a folder .*ODE_STOPPING_DATA"):
        libsvm("toy", download=True)
    assert available_libsvm() == ()


@pytest.mark.parametrize("name", ["a9a", "", "../toy", None])
@pytest.mark.parametrize("verify", [True, False])
def test_unknown_name(name: str, verify: bool, folder: Path) -> None:
    (folder / "a9a").write_bytes(TOY)
    with pytest.raises(ValueError, match="name must be one of toy, other; got"):
        libsvm(name, folder=folder, download=True, verify=verify)


@pytest.mark.parametrize("flag", ["download", "verify"])
def test_flags_are_flags(flag: str, folder: Path) -> None:
    with pytest.raises(TypeError, match=f"{flag} must be True or False; got str 'no'"):
        libsvm("toy", folder=folder, **{flag: "no"})


@pytest.mark.usefixtures("needs_sklearn")
@pytest.mark.parametrize("download", [False, True])
def test_wrong_checksum(download: bool, folder: Path, server: Path) -> None:
    changed = TOY.replace(b"\n", b"\r\n")
    (folder / "toy").write_bytes(changed)
    with pytest.raises(ValueError, match="is not the known file toy") as caught:
        libsvm("toy", folder=folder, download=download)
    for part in (
        str(folder / "toy"),
        hashlib.sha256(changed).hexdigest(),
        hashlib.sha256(TOY).hexdigest(),
        "verify=False",
    ):
        assert part in str(caught.value)
    assert (folder / "toy").read_bytes() == changed  # nobody's file is replaced
    X, y = libsvm("toy", folder=folder, download=download, verify=False)
    assert torch.equal(X, torch.tensor(X_TOY, dtype=torch.float64))
    assert y.tolist() == Y_TOY


@pytest.mark.usefixtures("needs_sklearn")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n", "is not svmlight text"),
        (b"\x1f\x8b\x08\x00 not text \xff\n", "is not svmlight text"),
        (b"-1 0:1 2:1\n", "is not svmlight text with indices from 1"),
        (b"0 1:1\n1 2:1\n", "must have rows labelled -1 and .1; got 0, 1"),
        (b"1 1:1\n2 2:1\n", "got 1, 2"),
        (b"nan 1:1\n", "got nan"),
        (b"", "got no rows"),
    ],
)
def test_what_is_no_such_file(content: bytes, message: str, tmp_path: Path, server: Path) -> None:
    (tmp_path / "toy").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        libsvm("toy", folder=tmp_path, verify=False)
    assert str(tmp_path / "toy") in str(caught.value)
    (server / "toy").write_bytes(content)  # a download of it is not kept
    with pytest.raises(ValueError, match=message):
        libsvm("toy", folder=tmp_path / "new", download=True, verify=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("needs_sklearn")
def test_download(tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "made" / "on the way"
    X, y = libsvm("toy", folder=target, download=True)
    assert torch.equal(X, torch.tensor(X_TOY, dtype=torch.float64))
    assert y.tolist() == Y_TOY
    assert [path.name for path in target.iterdir()] == ["toy"]
    assert (target / "toy").read_bytes() == TOY
    mode = (server / "toy").stat().st_mode  # an ordinary file's, not that of a private one
    assert (target / "toy").stat().st_mode == mode
    (server / "toy").unlink()  # what is there is not fetched again
    assert torch.equal(libsvm("toy", folder=target, download=True)[0], X)
    (server / "other").write_bytes(OTHER)
    monkeypatch.setenv("ODE_STOPPING_DATA", str(target))
    assert libsvm("other", download=True)[0].tolist() == [[1.0], [0.0]]
    assert available_libsvm() == ("toy", "other")


@pytest.mark.usefixtures("needs_sklearn")
def test_download_with_wrong_checksum_leaves_nothing(tmp_path: Path, server: Path) -> None:
    (server / "toy").write_bytes(OTHER)
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "new", tmp_path / "there"):
        with pytest.raises(ValueError, match="is not the known file toy") as caught:
            libsvm("toy", folder=target, download=True)
        assert (server / "toy").as_uri() in str(caught.value)
        assert hashlib.sha256(OTHER).hexdigest() in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "there").iterdir()) == []
    assert libsvm("toy", folder=tmp_path / "there", download=True, verify=False)[0].shape == (2, 1)


@pytest.mark.usefixtures("needs_sklearn")
def test_download_of_a_missing_file_leaves_nothing(tmp_path: Path, server: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    with pytest.raises(ConnectionError, match="by hand") as caught:
        libsvm("other", folder=target, download=True)
    assert (server / "other").as_uri() in str(caught.value)
    assert str(target / "other") in str(caught.value)
    assert list(target.iterdir()) == []


@pytest.mark.usefixtures("needs_sklearn")
@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        urllib.error.HTTPError("http://here", 404, "Not Found", Message(), io.BytesIO()),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b"-1 1:1", 100),
    ],
    ids=lambda error: type(error).__name__,
)
def test_network_errors(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(address: str, *, timeout: float) -> None:
        assert address == "file:///nowhere/at/all/toy"
        assert 0 < timeout <= 60
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(ConnectionError, match="could not be fetched") as caught:
        libsvm("toy", folder=tmp_path, download=True)
    assert caught.value.__cause__ is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("needs_sklearn")
def test_failure_to_store_leaves_nothing(
    tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fails(source: Path, target: Path) -> None:
        seen.append(source.read_bytes())
        assert not target.exists()
        assert target.parent in source.parents  # one file system, as an atomic move needs
        raise PermissionError("planted")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(PermissionError, match="planted"):
        libsvm("toy", folder=tmp_path / "new", download=True)
    assert seen == [TOY]
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("download", [False, True])
def test_missing_extra_is_named(
    download: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing answers here, so the error below says too that nothing was asked for.
    monkeypatch.setitem(sys.modules, "sklearn", None)
    target = folder / "new" if download else folder
    with pytest.raises(ImportError, match=r'pip install "ode-stopping\[checks\]"'):
        libsvm("toy", folder=target, download=download)
    assert not (folder / "new").exists()


def test_available(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_libsvm(folder) == ("toy", "other")
    monkeypatch.setenv("ODE_STOPPING_DATA", str(folder))
    (folder / "toy").unlink()
    (folder / "toy").mkdir()  # a folder is no file
    assert available_libsvm() == ("other",)
    assert available_libsvm(folder / "nowhere") == ()


@pytest.mark.skipif(not REAL, reason="ODE_STOPPING_DATA names no folder with the LIBSVM files")
@pytest.mark.usefixtures("needs_sklearn")
@pytest.mark.parametrize(
    ("name", "shape", "labels", "nonzeros"),
    [
        ("a1a", (1605, 119), (1210, 395), 22249),
        ("a2a", (2265, 119), (1693, 572), 31404),
        ("a3a", (3185, 122), (2412, 773), 44162),
        ("w3a", (4912, 300), (4769, 143), 57248),
    ],
)
def test_real_files(
    name: str,
    shape: tuple[int, int],
    labels: tuple[int, int],
    nonzeros: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # the known files and the environment as they are
    assert name in available_libsvm()
    X, y = libsvm(name)
    assert X.shape == shape
    assert y.shape == shape[:1]
    assert (int((y == -1).sum()), int((y == 1).sum())) == labels
    assert int((X != 0).sum()) == nonzeros
    if name == "w3a":
        assert int((X == 0).all(1).sum()) == 408
