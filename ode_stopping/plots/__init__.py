"""Pictures of runs, one call each, on matplotlib axes: `from ode_stopping import plots`.

    plots.plot_paths(f, {"flow": continuous, "Euler": iteration})

Every helper takes `axes` (None makes a figure of its own), draws what results of either side hold,
and returns the axes; graphs are left alone. Drawing needs matplotlib, which the extra `checks`
brings; importing this package does not.

`plot_solution` and `plot_phase` draw what `integrate` returns, with its jumps and events.

Where a helper takes `runs`, that is one result (of `stopping_time` or `stopping_index`) or its
trajectory, a sequence of them, or a mapping from names to them. Colours are those of the axes'
cycle; axes that are made here have one that colour-blind readers can tell apart.
"""

from .criterion import plot_criterion
from .fan import plot_fan
from .motion import plot_energy, plot_phase, plot_states
from .paths import plot_paths
from .sensitivity import plot_sensitivity, sweep
from .solutions import plot_solution
from .spectrum import flow_spectrum, plot_spectrum

__all__ = [
    "flow_spectrum",
    "plot_criterion",
    "plot_energy",
    "plot_fan",
    "plot_paths",
    "plot_phase",
    "plot_sensitivity",
    "plot_solution",
    "plot_spectrum",
    "plot_states",
    "sweep",
]
