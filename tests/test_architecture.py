"""The shape of the code base: who may import whom, how long files are, that versions agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ode_stopping", "discrete", "theory_checks")
# From the bottom up: a layer imports itself and what stands before it, nothing after.
LAYERS = (*PACKAGES, "notebooks", "benchmarks", "tests")
MAX_LINES = 450
EXTRAS = ("sklearn", "matplotlib", "typer", "rich", "joblib", "pandas", "safetensors")


def imported_roots(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, top-level name) of every absolute import, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args:
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            argument = node.args[0]
            if (
                name in ("import_module", "__import__")
                and isinstance(argument, ast.Constant)
                and isinstance(argument.value, str)
            ):
                yield node.lineno, argument.value.partition(".")[0]


def upward_imports(root: Path) -> list[str]:
    """Return 'file:line imports name' for each import that goes up the layers below ``root``."""
    found = []
    for position, package in enumerate(PACKAGES):
        forbidden = LAYERS[position + 1 :]
        for path in sorted((root / package).rglob("*.py")):
            for line, name in imported_roots(path.read_text(encoding="utf-8")):
                if name in forbidden:
                    found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def package_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def python_files() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def undocumented(path: Path) -> list[str]:
    """Return what lacks a docstring: the module, its public functions and classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    missing = [node.name for node in public if ast.get_docstring(node) is None]
    return missing if ast.get_docstring(tree) is not None else ["the module itself", *missing]


def test_imports_point_one_way() -> None:
    assert upward_imports(ROOT) == []


@pytest.mark.parametrize(
    ("package", "statement"),
    [
        ("ode_stopping", "import discrete"),
        ("ode_stopping", "import theory_checks.report as report"),
        ("ode_stopping", "def late():\n    from discrete.gradients.adjoint import DiscreteAdjoint"),
        ("ode_stopping", "import importlib\nimportlib.import_module('discrete.rules.updates')"),
        ("discrete", "if True:\n    from theory_checks import studies"),
        ("discrete", "module = __import__('theory_checks')"),
        ("theory_checks", "from tests.conftest import device"),
    ],
)
def test_upward_import_is_caught(tmp_path: Path, package: str, statement: str) -> None:
    for name in PACKAGES:
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / package / "inner" / "planted.py").write_text(statement + "\n", encoding="utf-8")
    caught = upward_imports(tmp_path)
    assert len(caught) == 1
    assert caught[0].startswith(str(Path(package, "inner", "planted.py")))


def test_downward_and_relative_imports_are_allowed(tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name).mkdir()
    (tmp_path / "theory_checks" / "fine.py").write_text(
        "import discrete\nfrom ode_stopping.flows import GradientFlow\nfrom . import discrete\n",
        encoding="utf-8",
    )
    (tmp_path / "discrete" / "fine.py").write_text(
        "import ode_stopping\nfrom .theory_checks import of_the_same_package\n", encoding="utf-8"
    )
    assert upward_imports(tmp_path) == []


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files()
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_are_documented(path: Path) -> None:
    assert undocumented(path) == []


def test_missing_docstring_is_caught(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "def public(): ...\ndef _private(): ...\nclass Shown: ...\n", encoding="utf-8"
    )
    assert undocumented(planted) == ["the module itself", "public", "Shown"]


def test_importing_needs_no_extra() -> None:
    # A fresh interpreter: the one that runs the tests has long imported the extras.
    shown = f"print(*sorted(set({EXTRAS!r}) & set(sys.modules)))"
    code = f"import sys, ode_stopping, discrete, discrete.learned; {shown}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## \[([^\]]+)\]", changelog, flags=re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", citation, flags=re.MULTILINE)
    assert newest is not None
    assert cited is not None
    assert newest[1] == project["version"]
    assert cited[1] == project["version"]
