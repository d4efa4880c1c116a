"""The LIBSVM sets: where files are looked for, what is checked, and what a download leaves."""

from __future__ import annotations

import hashlib
import http.client
import importlib
import io
import os
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


def test_rows_and_labels(folder: Path) -> None:
    X, y = libsvm("toy", folder=folder)
    assert X.dtype == y.dtype == torch.float64
    assert X.layout == torch.strided
    assert torch.equal(X, torch.tensor(X_TOY, dtype=torch.float64))  # the third row is empty
    assert torch.equal(y, torch.tensor(Y_TOY, dtype=torch.float64))
    assert LogisticRegression(X, y).dim == 5


def test_dtype(folder: Path) -> None:
    X, y = libsvm("toy", folder=folder, dtype=torch.float32)
    assert X.dtype == y.dtype == torch.float32
    assert torch.equal(X, torch.tensor(X_TOY, dtype=torch.float32))
    assert y.tolist() == Y_TOY


def test_found_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODE_STOPPING_DATA", str(folder))
    assert libsvm("toy")[0].shape == (4, 5)
    assert libsvm("toy", folder="")[0].shape == (4, 5)
    (folder / "inner").mkdir()
    with pytest.raises(FileNotFoundError, match="inner"):  # the argument goes first
        libsvm("toy", folder=folder / "inner")


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


BAD_LINES = [
    (b"<!DOCTYPE html>", "label '<!DOCTYPE': must be -1 or +1"),
    (b"\x1f\x8b\x08\x00 not text \xff", r"label '\x1f\x8b\x08\x00': must be -1 or +1"),
    (b"0 1:1", "label '0': must be -1 or +1"),
    (b"2 2:1", "label '2'"),
    (b"nan 1:1", "label 'nan'"),
    (b"inf 1:1", "label 'inf'"),
    (b"1,-1 1:1", "label '1,-1'"),
    (b"1:1 2:1", "label '1:1'"),
    (b"1_ 2:1", "label '1_'"),
    (b"+1 1:nan", "feature '1:nan': its value is no finite number in decimals"),
    (b"+1 1:1 2:NaN", "feature '2:NaN'"),
    (b"+1 1:inf", "feature '1:inf'"),
    (b"+1 1:-Infinity", "feature '1:-Infinity'"),
    (b"+1 1:1e999", "feature '1:1e999': its value is beyond 1.798e+308"),
    (b"+1 1:-1e309", "feature '1:-1e309': its value is beyond 1.798e+308"),
    (b"+1 1:0x10", "feature '1:0x10'"),
    (b"+1 1:1_0", "feature '1:1_0'"),
    (b"+1 1:1e", "feature '1:1e'"),
    (b"+1 1:", "feature '1:': must be index:value"),
    (b"+1 :1", "feature ':1': must be index:value"),
    (b"+1 1", "feature '1': must be index:value"),
    (b"+1 1 :1", "feature '1': must be index:value"),
    (b"+1 1:1:1", "feature '1:1:1'"),
    (b"+1 a:1", "feature 'a:1': must be index:value"),
    (b"+1 -1:1", "feature '-1:1': must be index:value"),
    (b"+1 1.5:1", "feature '1.5:1': must be index:value"),
    ("+1 \u0663:1".encode(), "must be index:value"),  # a digit, and no ASCII one
    (b"+1 0:1 2:1", "feature '0:1': indices start from 1"),
    (b"+1 2:1 1:1", "feature '1:1': must be above 2 before it"),
    (b"+1 2:1 2:1", "feature '2:1': must be above 2 before it"),
    (b"+1 qid:3 1:1", "feature 'qid:3': query ids (qid), of ranking data, are not read"),
    (b"+1 2147483648:1", "index 2147483648 makes X, which is dense, 3 x 2147483648 (48 GiB)"),
    (b"+1 4294967297:1", "index 4294967297 makes X"),  # 2^32 + 1 is not 1
    (b"+1 18446744073709551617:1", "with an index of at most 18 digits"),  # 2^64 + 1
    (b"+1 " + b"9" * 100_000 + b":1", "feature '" + "9" * 37 + "...'"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_what_is_no_feature_is_refused_by_its_line(
    line: bytes, message: str, tmp_path: Path, server: Path
) -> None:
    content = b"-1 1:1 3:0.5\n\n# a comment\n" + line + b"\n+1 1:2\n"
    (tmp_path / "toy").write_bytes(content)
    with pytest.raises(ValueError, match=r"line 4, ") as caught:
        libsvm("toy", folder=tmp_path, verify=False)
    assert str(tmp_path / "toy") in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    (server / "toy").write_bytes(content)  # a download of it is not kept
    with pytest.raises(ValueError, match=r"line 4, "):
        libsvm("toy", folder=tmp_path / "new", download=True, verify=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# a comment alone\n"])
def test_a_file_without_rows(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "toy").write_bytes(content)
    with pytest.raises(ValueError, match="it has no rows"):
        libsvm("toy", folder=tmp_path, verify=False)


def test_the_size_of_a_dense_matrix_is_limited_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 rows, the 120th with index 5e7: 74.5 GiB in float64."""
    rows = [b"+1 1:1"] * 200
    rows[119] = b"-1 50000000:1"
    (tmp_path / "toy").write_bytes(b"\n".join(rows))
    with pytest.raises(ValueError, match="line 120, index 50000000") as caught:
        libsvm("toy", folder=tmp_path, verify=False)
    assert "200 x 50000000 (74.5 GiB); at most 134217728 numbers" in str(caught.value)
    assert "(1 GiB)" in str(caught.value)
    with pytest.raises(ValueError, match=r"37\.3 GiB.*\(0\.5 GiB\)"):
        libsvm("toy", folder=tmp_path, verify=False, dtype=torch.float32)
    monkeypatch.setattr(MODULE, "LARGEST_X", 20)  # just enough
    (tmp_path / "toy").write_bytes(TOY)
    assert libsvm("toy", folder=tmp_path)[0].shape == (4, 5)
    monkeypatch.setattr(MODULE, "LARGEST_X", 19)
    with pytest.raises(ValueError, match="line 4, index 5 makes X"):
        libsvm("toy", folder=tmp_path)


@pytest.mark.parametrize("verify", [False, True])
def test_the_size_of_a_file_is_limited_and_named(
    verify: bool, folder: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "LARGEST_FILE", len(TOY))
    assert libsvm("toy", folder=folder, verify=verify)[0].shape == (4, 5)
    monkeypatch.setattr(MODULE, "LARGEST_FILE", len(TOY) - 1)
    for target, download in ((folder, False), (folder / "new", True)):
        with pytest.raises(ValueError, match=f"more than {len(TOY) - 1} bytes"):
            libsvm("toy", folder=target, download=download, verify=verify)
    assert not (folder / "new").exists()


def test_a_value_that_the_type_does_not_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy").write_bytes(b"+1 1:3e38\n-1 1:-1e39\n")
    assert libsvm("toy", folder=tmp_path, verify=False)[0].tolist() == [[3e38], [-1e39]]
    with pytest.raises(ValueError, match=r"line 2, feature '1:-1e39': its value is beyond 3.403e"):
        libsvm("toy", folder=tmp_path, verify=False, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"line 1, feature '1:3e38': its value is beyond 6.55e"):
        libsvm("toy", folder=tmp_path, verify=False, dtype=torch.float16)
    (tmp_path / "toy").write_bytes(b"+1 1:3.4028234663852886e38\n")
    X, _ = libsvm("toy", folder=tmp_path, verify=False, dtype=torch.float32)
    assert float(X) == torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128, torch.bool, "float64", float])
def test_the_type_is_a_floating_one(dtype: torch.dtype, folder: Path) -> None:
    with pytest.raises(TypeError, match="dtype must be a floating type of torch; got"):
        libsvm("toy", folder=folder, dtype=dtype)


def test_what_good_files_may_look_like(tmp_path: Path) -> None:
    """Comments, blank lines, the line ends of Windows, tabs, every notation of a number."""
    text = b"# head\r\n\r\n+1\t1:1e-1 2:.5 3:5. 4:+2E+1 5:-0 # tail 1:nan\r\n-1.0 05:7\r\n1e0"
    (tmp_path / "toy").write_bytes(text)
    X, y = libsvm("toy", folder=tmp_path, verify=False)
    assert X.tolist() == [[0.1, 0.5, 5.0, 20.0, 0.0], [0.0, 0.0, 0.0, 0.0, 7.0], [0.0] * 5]
    assert y.tolist() == [1.0, -1.0, 1.0]


def test_numbers_are_those_of_an_independent_reader(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(50, 30, generator=generator, dtype=torch.float64)
    drawn *= torch.rand(50, 30, generator=generator) < 0.3
    drawn[:, -1] = 1e-300
    labels = torch.where(torch.rand(50, generator=generator) < 0.5, -1.0, 1.0).double()
    datasets.dump_svmlight_file(
        drawn.numpy(), labels.numpy(), str(tmp_path / "toy"), zero_based=False
    )
    X, y = libsvm("toy", folder=tmp_path, verify=False)
    theirs, also = datasets.load_svmlight_file(str(tmp_path / "toy"), zero_based=False)
    assert torch.equal(X, torch.from_numpy(theirs.toarray()))
    assert torch.equal(y, torch.from_numpy(also))


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


def test_download_of_a_missing_file_leaves_nothing(tmp_path: Path, server: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    with pytest.raises(ConnectionError, match="by hand") as caught:
        libsvm("other", folder=target, download=True)
    assert (server / "other").as_uri() in str(caught.value)
    assert str(target / "other") in str(caught.value)
    assert list(target.iterdir()) == []


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


def test_available(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_libsvm(folder) == ("toy", "other")
    monkeypatch.setenv("ODE_STOPPING_DATA", str(folder))
    (folder / "toy").unlink()
    (folder / "toy").mkdir()  # a folder is no file
    assert available_libsvm() == ("other",)
    assert available_libsvm(folder / "nowhere") == ()


@pytest.mark.skipif(not REAL, reason="ODE_STOPPING_DATA names no folder with the LIBSVM files")
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
