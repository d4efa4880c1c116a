"""The README's example prints what the README says it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pages import blocks, missing_targets

README = Path(__file__).resolve().parents[1] / "README.md"


def test_example_prints_what_is_printed_below_it(tmp_path: Path) -> None:
    code, continued, again = blocks(README, "python")[:3]
    script = tmp_path / "example.py"
    script.write_text(code + continued + again, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(README.parent), "PATH": ""},
    )
    assert run.returncode == 0, run.stderr
    comment = again.rpartition("  # ")[2]
    assert run.stdout == blocks(README, "text")[0] + comment


def test_every_check_is_in_the_table() -> None:
    import theory_checks.checks  # noqa: F401 - registers them
    from theory_checks.registry import REGISTRY

    table = README.read_text(encoding="utf-8")
    missing = [check.name for check in REGISTRY if f"`{check.name}`" not in table]
    assert not missing, f"not in the README's table: {missing}"


def test_links_lead_somewhere() -> None:
    assert missing_targets(README) == []
