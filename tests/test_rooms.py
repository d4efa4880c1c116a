"""The rooms of the two packages: which folder may know which, and no two wait for each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a room must never import, as addresses of folders or files; "*" is every other room.
NEVER = {
    "ode_stopping.core": ("*",),
    "ode_stopping.solving": (
        "ode_stopping.crossing",
        "ode_stopping.gradients",
        "ode_stopping.plots",
        "ode_stopping.result",
        "ode_stopping.stopping",
    ),
    "ode_stopping.crossing": (
        "ode_stopping.gradients",
        "ode_stopping.plots",
        "ode_stopping.result",
        "ode_stopping.stopping",
    ),
    "ode_stopping.gradients": (
        "ode_stopping.plots",
        "ode_stopping.result",
        "ode_stopping.stopping",
    ),
    "ode_stopping.criteria": ("ode_stopping.flows", "ode_stopping.plots"),
    "ode_stopping.flows": ("ode_stopping.criteria", "ode_stopping.plots"),
    "ode_stopping.problems": ("ode_stopping.flows", "ode_stopping.criteria", "ode_stopping.plots"),
    "ode_stopping.result": ("ode_stopping.plots",),
    "discrete": (
        "ode_stopping.solving",
        "ode_stopping.crossing",
        "ode_stopping.gradients",
        "ode_stopping.result",
    ),
    "discrete.rules": (
        "discrete.iterating",
        "discrete.gradients",
        "discrete.learned",
        "discrete.online",
    ),
    "discrete.iterating": ("discrete.gradients", "discrete.learned", "discrete.online"),
    "discrete.gradients": ("discrete.learned", "discrete.online", "ode_stopping.plots"),
    "discrete.online": (
        "discrete.rules",
        "discrete.iterating",
        "discrete.gradients",
        "discrete.learned",
        "ode_stopping.plots",
    ),
    # A rule and its training: what runs, differentiates and adapts an update is not asked for.
    "discrete.learned": (
        "discrete.iterating",
        "discrete.gradients",
        "discrete.online",
        "discrete.result",
        "discrete.stopping",
        "ode_stopping.plots",
    ),
    "discrete.result": ("ode_stopping.plots",),
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and full address of everything imported, `from x import y` as x.y."""
    name = module_name(path, root)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)] if node.level else []
            origin = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                yield node.lineno, ".".join([*origin, alias.name])


def inside(address: str, room: str) -> bool:
    return address == room or address.startswith(room + ".")


def forbidden(root: Path) -> list[str]:
    """'file:line imports address' for each arrow that must never be."""
    found = []
    for path in sorted([*root.glob("ode_stopping/**/*.py"), *root.glob("discrete/**/*.py")]):
        name = module_name(path, root)
        for room, never in NEVER.items():
            if not inside(name, room):
                continue
            for line, address in imports(path, root):
                ours = inside(address, "ode_stopping") or inside(address, "discrete")
                if never == ("*",):
                    wrong = ours and not inside(address, room)
                else:
                    wrong = any(inside(address, other) for other in never)
                if wrong:
                    found.append(f"{path.relative_to(root)}:{line} imports {address}")
    return found


def cycles(root: Path) -> list[tuple[str, str]]:
    """Pairs of rooms (folders, or files beside them) that reach each other."""

    def room(address: str) -> str:
        return ".".join(address.split(".")[:2])

    arrows: dict[str, set[str]] = {}
    for path in [*root.glob("ode_stopping/**/*.py"), *root.glob("discrete/**/*.py")]:
        name = module_name(path, root)
        if "." not in name:
            continue  # a package's own __init__ hands out what stands in its rooms
        for _, address in imports(path, root):
            target = room(address)
            known = (root / target.replace(".", "/")).exists() or (
                root / (target.replace(".", "/") + ".py")
            ).exists()
            if known and "." in target and target != room(name):
                arrows.setdefault(room(name), set()).add(target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            for following in arrows.get(pending.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    pending.append(following)
        return seen

    reach = {start: reached(start) for start in arrows}
    return [(a, b) for a in reach for b in reach[a] if a < b and a in reach.get(b, ())]


def test_no_arrow_that_must_never_be() -> None:
    assert forbidden(ROOT) == []


def test_no_two_rooms_wait_for_each_other() -> None:
    assert cycles(ROOT) == []


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("ode_stopping/core/planted.py", "from ..solving.step import Step"),
        ("ode_stopping/core/planted.py", "import discrete"),
        ("ode_stopping/solving/planted.py", "def late():\n    from ..gradients import route"),
        ("ode_stopping/crossing/planted.py", "from ode_stopping.plots import plot_paths"),
        ("ode_stopping/criteria/planted.py", "from .. import flows"),
        ("ode_stopping/flows/planted.py", "from ..criteria import Criterion"),
        ("discrete/planted.py", "from ode_stopping.crossing.scan import scan_step"),
        ("discrete/online/planted.py", "from ..gradients.adjoint import DiscreteAdjoint"),
        ("discrete/learned/planted.py", "from ..stopping import stopping_index"),
    ],
)
def test_forbidden_arrow_is_caught(tmp_path: Path, file: str, statement: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(statement + "\n", encoding="utf-8")
    (caught,) = forbidden(tmp_path)
    assert caught.startswith(file)


def test_cycle_is_caught(tmp_path: Path) -> None:
    for name, other in (("solving", "crossing"), ("crossing", "solving")):
        (tmp_path / "ode_stopping" / name).mkdir(parents=True)
        (tmp_path / "ode_stopping" / name / "a.py").write_text(f"from ..{other} import a\n")
    assert cycles(tmp_path) == [("ode_stopping.crossing", "ode_stopping.solving")]
