"""What is shipped: three typed packages and nothing else."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ode_stopping", "discrete", "theory_checks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    """Return name -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {name: version for name, _, version in pinned}


def shipped_files() -> set[str]:
    """Return the files of the three packages that a wheel has to hold, relative to the root."""
    kinds = ("*.py", "py.typed", "*.j2", "*.css")
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for kind in kinds
        for path in (ROOT / package).rglob(kind)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy: a build leaves folders behind, and reads older ones."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*PACKAGES, "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
    info = f"ode_stopping-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in files} == {*PACKAGES, info}
    assert {name for name in files if not name.startswith(info)} == shipped_files()


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_says_that_it_is_typed(wheel: Path, package: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert f"{package}/py.typed" in archive.namelist()


@pytest.mark.slow
def test_wheel_requires_only_the_core(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    required = (
        Requirement(line.removeprefix("Requires-Dist: "))
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ")
    )
    core = {requirement.name for requirement in required if requirement.marker is None}
    assert core == {"torch", "torchdiffeq", "numpy", "scipy"}


def test_every_folder_of_code_is_a_package() -> None:
    # With namespaces = false a folder without __init__.py is left out of the wheel in silence.
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_constraints_pin_every_dependency_within_its_range() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    pinned = pins()
    for requirement in requirements:
        if requirement.name == PROJECT["name"]:
            continue
        assert requirement.name in pinned
        assert requirement.specifier.contains(pinned[requirement.name])


def test_installed_version_is_the_one_of_pyproject() -> None:
    try:
        installed = importlib.metadata.version("ode-stopping")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ode-stopping is not installed here")
    assert installed == PROJECT["version"]
