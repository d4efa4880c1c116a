"""Full disks and folders that may not be written: one sentence, a status, and what was kept."""

from __future__ import annotations

import copy
import errno
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from dummy_checks import ROOT, Dummies, good, pictured, run, summary
from test_checks_command import environment

from theory_checks import files
from theory_checks.cells import CellCache
from theory_checks.context import Context
from theory_checks.files import WriteError, run_script, write_atomically, write_text
from theory_checks.registry import Outcome

SCRIPTS = sorted(
    path
    for folder in ("benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def double(item: int) -> int:
    """A cell."""
    return 2 * item


def celled(context: Context) -> Outcome:
    """A check with two cells."""
    return Outcome.within(float(sum(context.map(double, [1, 2]))), 6.0, 0.0)


class Disk:
    """Takes `room` files, then none until it is made larger."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
        self.room = 10**9
        self.taken = 0
        replace = os.replace

        def limited(source: Any, target: Any) -> None:
            if self.taken >= self.room:
                raise OSError(error, os.strerror(error), source)
            self.taken += 1
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", limited)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_is_full_at_any_file_keeps_what_came_before(
    dummies: Dummies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    dummies.add("one", good)
    dummies.add("two", pictured)
    dummies.add("three", celled)
    disk = Disk(monkeypatch, error)
    run(dummies.registry, tmp_path / "reference")
    whole = disk.taken
    assert whole >= 12  # two of the page four times, three results, one figure, two cells
    for room in range(0, whole, 2) if error == errno.ENOSPC else (0, whole // 2):
        disk.room, disk.taken, out = room, 0, tmp_path / str(room)
        dummies.calls.clear()
        result = run(dummies.registry, out)
        assert result.exit_code == 3
        sentence = result.output.splitlines()[-1]
        assert sentence.startswith(f"cannot write {out}")
        assert os.strerror(error) in sentence
        assert "Traceback" not in result.output
        stored = {path.stem for path in (out / "results").glob("*.json")}
        kept = sentence.split("finished and kept: ")[1].split(";")[0].split(", ")
        assert set(kept) == (stored or {"nothing"})
        assert not list(out.rglob(".*"))  # no part of a file is left
        ran = set(dummies.calls)
        if "not kept" in sentence:
            assert sentence.split("not kept: ")[1].split(";")[0] in ran - stored
        disk.room = 10**9
        dummies.calls.clear()
        assert run(dummies.registry, out).exit_code == 0
        assert set(dummies.calls) == {"one", "two", "three"} - stored
        assert [entry["passed"] for entry in summary(out)["checks"]] == [True] * 3


def test_a_full_disk_is_no_failed_check_and_keeps_its_cells(
    dummies: Dummies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dummies.add("three", celled)
    disk = Disk(monkeypatch, errno.ENOSPC)
    disk.room = 3  # the page, its summary, one cell
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 3
    assert "FAIL" not in result.output
    assert "kept: nothing; cells kept: 1; the same command goes on from there" in result.output
    assert len(list((tmp_path / "cells" / "three").glob("*.json"))) == 1
    disk.room = 10**9
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 0
    assert "1 of 2 cells reused" in result.output


def test_workers_pass_a_full_disk_on(dummies: Dummies, tmp_path: Path) -> None:
    """The error crosses the border of a process, and remains what it was."""
    error = WriteError(Path("a/b"), "No space left on device")
    twin = copy.copy(error)
    assert str(twin) == str(error) == "cannot write a/b: No space left on device"

    def check(context: Context) -> Outcome:
        (tmp_path / "blocked").touch()
        parallel = replace(context, cells=CellCache(tmp_path / "blocked" / "cells"), jobs=2)
        return Outcome.within(float(sum(parallel.map(double, [1, 2, 3]))), 12.0, 0.0)

    dummies.add("one", check)
    result = run(dummies.registry, tmp_path / "out")
    assert result.exit_code == 3
    assert f"cannot write {tmp_path / 'blocked' / 'cells'}" in result.output


@pytest.mark.parametrize("below", ["file/out", "file/deep/out"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_runs(
    dummies: Dummies, tmp_path: Path, below: str
) -> None:
    dummies.add("one", good)
    (tmp_path / "file").touch()
    result = run(dummies.registry, tmp_path / below)
    assert result.exit_code == 3
    (line,) = result.output.splitlines()
    assert line == (f"cannot write {tmp_path / below}: Not a directory; finished and kept: nothing")
    assert dummies.calls == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["", "results", "figures", "cells"])
def test_a_folder_without_the_right_to_write(dummies: Dummies, tmp_path: Path, name: str) -> None:
    dummies.add("one", good)
    (tmp_path / "out" / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / name).chmod(0o500)
    result = run(dummies.registry, tmp_path / "out")
    assert result.exit_code == 3
    assert "Permission denied; finished and kept: nothing" in result.output
    assert dummies.calls == {}


def test_cells_that_cannot_be_removed_are_not_reused_in_silence(
    dummies: Dummies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dummies.add("three", celled)
    run(dummies.registry, tmp_path)

    def fails(path: Path) -> None:
        if path.name == "three":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        raise FileNotFoundError

    monkeypatch.setattr("theory_checks.runner.shutil.rmtree", fails)
    result = run(dummies.registry, tmp_path, "--fresh")
    assert result.exit_code == 3
    assert "cells/three: Permission denied" in result.output
    assert dummies.calls == {"three": 1}


LIMITED = """
import resource, sys
from theory_checks.cli import make_app
from theory_checks.files import run_script
from theory_checks.registry import Outcome, Registry, check

registry = Registry()

@check(name="first", title="First", source="Eq. (1)", group="g", registry=registry)
def first(context):
    '''Holds.'''
    return Outcome.below(0.0, 1e-12)

@check(name="second", title="Second", source="Eq. (2)", group="g", registry=registry)
def second(context):
    '''Has more to tell than the disk takes.'''
    return Outcome.below(0.0, 1e-12, details={"text": "x" * 100_000})

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
run_script(make_app(registry))
"""


def test_the_system_itself_refuses_a_file(tmp_path: Path) -> None:
    """A limit of the operating system on the size of files, as a quota has it."""
    pytest.importorskip("resource")
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    command = [sys.executable, str(script), "run", "--jobs", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert "results/second.json: File too large" in line
    assert "finished and kept: first; finished and not kept: second" in line
    assert "first PASS" in done.stdout
    assert [entry["name"] for entry in summary(tmp_path / "out")["checks"]] == ["first"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", [["-m", "theory_checks", "list"]])
def test_a_full_disk_under_standard_output(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, *command],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 3
    assert done.stderr == "cannot write to standard output: No space left on device\n"


# --- scripts -----------------------------------------------------------------------------------


def exit_status(main: Callable[[], object]) -> Any:
    """The status with which a script ends."""
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    return caught.value.code


def test_a_script_ends_with_its_status_or_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(error: BaseException) -> Callable[[], None]:
        def main() -> None:
            raise error

        return main

    assert exit_status(lambda: None) == 0
    assert exit_status(refuses(SystemExit(2))) == 2
    assert exit_status(refuses(WriteError(Path("a"), "why"))) == 3
    assert capsys.readouterr().err == "cannot write a: why\n"
    assert exit_status(refuses(OSError(errno.ENOSPC, "No space left", "name"))) == 3
    assert capsys.readouterr().err == "cannot write name: No space left\n"
    for error in (FileNotFoundError(errno.ENOENT, "no such file", "name"), ValueError("a bug")):
        with pytest.raises(type(error)):
            run_script(refuses(error))


def test_what_a_script_found_is_printed_where_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="its text is printed instead"):
        write_text(tmp_path / "file" / "out.md", "| hours | of work |")
    assert capsys.readouterr().out == "| hours | of work |\n"
    write_text(tmp_path / "made" / "out.md", "\u2200")
    assert (tmp_path / "made" / "out.md").read_text(encoding="utf-8") == "\u2200"


def test_devices_and_links_are_written_not_replaced(tmp_path: Path) -> None:
    write_text(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    for error in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):

        def fails(source: str, target: Path, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(files.os, "replace", fails)
        expected = WriteError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            write_atomically(path, b"new")
        monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def loaded(script: Path) -> Iterator[ModuleType]:
    """A script as a module, with its folder on the path as where it is run."""
    sys.path.insert(0, str(script.parent))
    known = set(sys.modules)
    try:
        spec = importlib.util.spec_from_file_location(f"script_{script.parent.name}", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(script.parent))
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if Path(file).parent == script.parent:
                del sys.modules[name]


@pytest.fixture(name="script", params=SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def make_script(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    yield from loaded(request.param)


def test_every_script_says_before_its_work_that_its_output_cannot_be_written(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    blocked = tmp_path / "file" / "folder"
    out = ["--out", str(blocked / "out.md")]
    for name in ("IMAGES", "PAGE"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, blocked)
            out = []
    monkeypatch.setattr(sys, "argv", [script.__file__ or "", *out])
    assert exit_status(script.main) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"cannot write {blocked}: Not a directory\n"


def test_no_script_writes_past_the_module_that_says_so() -> None:
    assert len(SCRIPTS) >= 12
    bare = (".write_text(", ".write_bytes(", ".savefig(", "open(", "np.save", "torch.save")
    for path in SCRIPTS:
        assert "    run_script(main)\n" in path.read_text(encoding="utf-8"), path
    for folder in ("benchmarks", "docs", "theory_checks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            allowed = {"files.py", "plotting.py", "flow_pictures.py"}  # the last two into memory
            if path.name not in allowed:
                assert not any(call in text for call in bare if call != "open("), path
