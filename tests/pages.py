"""Pages with examples: their blocks of code, what the code prints, and where their links lead."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def printed(code: str, name: str) -> str:
    """What code prints, run here as a script of its own; pytest makes its warnings errors."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
    return out.getvalue()


def printed_in_turn(page: Path) -> list[str]:
    """What each Python block of a page prints; later ones go on with the names of earlier ones."""
    names: dict[str, object] = {"__name__": "__main__"}
    found = []
    for code in blocks(page, "python"):
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(code, page.stem, "exec"), names)
        found.append(out.getvalue())
    return found


def missing_targets(page: Path) -> list[str]:
    """Links to files that are not there."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
