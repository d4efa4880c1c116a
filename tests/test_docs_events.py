"""The page on events: what its examples print, held against closed forms, and where it leads."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import blocks, missing_targets, printed_in_turn

from ode_stopping import Event, KinkWarning, Status, integrate

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to-events.md"
OUTPUTS = blocks(PAGE, "text")
# Half a unit of the last digit that is printed, and a little.
PRINTED = 6e-7


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def numbers(text: str) -> list[float]:
    """Decimal fractions in a text, in order."""
    return [float(found) for found in re.findall(r"-?\d+\.\d+", text)]


def test_every_example_prints_what_is_printed_below_it() -> None:
    assert printed_in_turn(PAGE) == OUTPUTS


def test_links_lead_somewhere() -> None:
    assert missing_targets(PAGE) == []


def test_passages_of_the_oscillator() -> None:
    """x = cos(2 t): T = (n - 1/2) pi/w, dT/dw = -T/w."""
    quarter = math.pi / 4.0
    passed = [n * quarter for n in (1, 5, 3)]
    expected = [x for time in passed for x in (time, -time / 2.0)]
    assert numbers(OUTPUTS[0]) == pytest.approx(expected, abs=PRINTED)
    assert numbers(OUTPUTS[1]) == pytest.approx([5 * quarter, -2.5 * quarter], abs=PRINTED)
    in_turn = [n * quarter for n in (0, 1, 2, 3, 5)]
    assert numbers(OUTPUTS[2]) == pytest.approx(in_turn, abs=PRINTED)


def test_impacts_of_the_ball() -> None:
    e, g = 0.8, 9.81
    root = math.sqrt(2.0 / g)
    times = [root * (1.0 + 2.0 * sum(e**k for k in range(1, n))) for n in (1, 2, 3)]
    # After the third impact the ball rises with e^3 sqrt(2 g).
    since = 2.0 - times[2]
    speed = e**3 * math.sqrt(2.0 * g)
    height = speed * since - 0.5 * g * since**2
    late = 2.0 * root * (1.0 + 2.0 * e)
    slope = 3.0 * e**2 * math.sqrt(2.0 * g) * since - late * (speed - g * since)
    expected = [*times, late, height, slope]
    assert numbers(OUTPUTS[3]) == pytest.approx(expected, abs=PRINTED)
    assert numbers(OUTPUTS[6]) == pytest.approx([root * (1.0 + e) / (1.0 - e)], abs=PRINTED)


def test_doses_and_values_at_given_times() -> None:
    k = 0.5
    amount = math.exp(-3.0 * k) + math.exp(-2.0 * k)
    by_rate = -3.0 * math.exp(-3.0 * k) - 2.0 * math.exp(-2.0 * k)
    expected = [amount, by_rate, k * math.exp(-2.0 * k)]
    assert numbers(OUTPUTS[4]) == pytest.approx(expected, abs=PRINTED)
    values = [math.exp(-2.0 * k) + math.exp(-k), math.exp(-0.5 * k), math.exp(-k) + 1.0]
    assert numbers(OUTPUTS[5]) == pytest.approx(
        [*values, -k * values[0], -k * values[1]], abs=PRINTED
    )


def test_the_order_of_events_at_one_time() -> None:
    """1 -> 2 -> -3 and one unit of time more; or 1 -> -4 and one more."""
    assert OUTPUTS[7] == "[0, 1] x(2) = -2.0\n[0] x(2) = -3.0\n"


def test_resets_at_equal_learned_times_are_told() -> None:
    """x = 1 at t = 1, then doubled and shifted, and one more unit of time."""
    first, second = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    events = [Event.at(first, reset=lambda t, x: 2.0 * x)]
    events += [Event.at(second, reset=lambda t, x: x - 5.0)]
    x0 = torch.zeros(1, dtype=torch.float64)
    with pytest.warns(KinkWarning, match="met together"):
        found = integrate(lambda t, x: torch.ones_like(x), x0, until=2.0, events=events)
    assert float(found.end.state.detach()) == pytest.approx(-2.0)


def test_the_table_of_statuses() -> None:
    rows = re.findall(r"^\| ([A-Z_, ]+) \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    named = {name for row in rows for name in row.split(", ")}
    # AT_START is how `stopping_time` calls an event that is met at t0 and ends the run.
    assert named == {status.name for status in Status} - {"AT_START"}
    x0 = torch.ones(1, dtype=torch.float64)
    events = [Event(lambda t, x: x[0], 0.5), Event(lambda t, x: x[0], -1.0, terminal=True)]
    missed = integrate(lambda t, x: -x, x0, events=events, max_time=2.0)
    assert missed.status is Status.NOT_REACHED
    assert float(missed.first(0)) == pytest.approx(math.log(2.0), rel=1e-6)
