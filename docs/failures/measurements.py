"""Every measurement by its name, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable

import torch
from adjoint import backward, denominator, stiff
from arithmetic import arithmetic, precision
from crossings import dip_in_a_step, grazing
from derivatives import clock, lost, second, transforms
from evidence import cost, example_any, example_check, example_evidence, example_kink
from jumps import state_jump, time_jump
from limits import narrow, pulse
from misses import diverging, means, unreached
from page import Table
from updates import increase, index, stochastic

MEASUREMENTS: dict[str, Callable[[], Table | str]] = {
    function.__name__: function
    for function in (
        backward, stiff, denominator, lost, unreached, diverging, dip_in_a_step, grazing, time_jump,
        state_jump, precision, arithmetic, second, stochastic, index, increase, means, transforms,
        cost, narrow, pulse, clock, example_evidence, example_check, example_kink,
        example_any,
    )
}  # fmt: skip


def measured(name: str) -> str:
    """The table of one measurement; its figure is saved."""
    torch.set_num_threads(1)
    return str(MEASUREMENTS[name]())
