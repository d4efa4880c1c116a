"""In which order watches are met in a step: by time, and where that cannot be told, as listed."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch

from ..call import Call
from ..core.level import Rounding
from ..solving.flow_map import FlowPiece
from ..solving.step import Step
from .refine import refine
from .scan import Met, Scan
from .watches import Watches

__all__ = ["in_order"]

# Of the step: what is this near on the dense output is looked at by partial steps.
_NEAR = 1e-3
# Times closer than some roundings of the clock and of J are one.
_ROUNDINGS = 8.0


def in_order(
    call: Call, flow: FlowPiece, step: Step, watches: Watches, scans: Iterable[Scan]
) -> list[Met]:
    """What is met in a step, in the order in which it takes place.

    Args:
        call: What was asked.
        flow: The flow on this piece.
        step: The step.
        watches: What the run waits for.
        scans: What each J did in the step.
    """
    found = [met for scan in scans for met in scan.met]
    clocks = [Met(w, -w.target) for w in watches.clocks if -w.target <= step.t1]
    if len(found) + len(clocks) < 2:
        return found + clocks
    found += _just_missed(step, watches, found, clocks)
    # (Those of one J come in the order of its targets.)
    ordered = sorted([*found, *clocks], key=attrgetter("time"))
    if not call.rules:  # (one J, whose close targets stay in their order)
        return found
    clusters: list[list[Met]] = []
    for met in ordered:
        near = clusters and met.time - clusters[-1][-1].time <= _NEAR * step.length
        if near:
            clusters[-1].append(met)
        else:
            clusters.append([met])
    return [met for cluster in clusters for met in _sorted(call, flow, step, cluster)]


def _just_missed(step: Step, watches: Watches, found: list[Met], clocks: list[Met]) -> list[Met]:
    """Targets that J has reached to rounding where the run ends at a known time."""
    if not any(clock.watch.count == 1 and clock.time == step.t1 for clock in clocks):
        return []
    known = {met.watch.index for met in found}
    missed = []
    for watch in watches.waiting:
        if watch.leave is None and watch.index not in known:
            value = watch.criterion.value(step.t1, step.y1)
            rounding = Rounding.at(watch.criterion, step.t1, step.y1)
            if value <= rounding.beyond(watch.target):
                missed.append(Met(watch, step.t1))
    return missed


def _sorted(call: Call, flow: FlowPiece, step: Step, cluster: list[Met]) -> list[Met]:
    """A few that are near to each other: those at one time in the order of their events."""
    if len(cluster) == 1:
        return cluster
    exact: list[tuple[float, float, Met]] = []
    for met in cluster:
        time, error = met.time, 0.0
        if met.watch.time is None:
            point = refine(call, flow, step, met.watch, met.time, step.t1)[1]
            time, error = point.time, point.rounding / max(abs(point.rate), 1e-300)
        error = _ROUNDINGS * (error + torch.finfo(torch.float64).eps * abs(time))
        exact.append((time, error, met))
    exact.sort(key=lambda entry: entry[0])
    result: list[Met] = []
    while exact:
        first = exact[0]
        together = [e for e in exact if e[0] - first[0] <= first[1] + e[1]]
        together.sort(key=lambda entry: (entry[2].watch.event, entry[2].watch.index))
        result += [met for _, _, met in together]
        exact = [e for e in exact if all(e is not other for other in together)]
    return result
