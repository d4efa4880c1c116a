from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from plotted import (
    F64,
    LOSS,
    START,
    TARGET,
    circle,
    data,
    decay,
    decay_time,
    drawn_and_closed,
    energy,
    euler,
    labels,
    start,
    with_marker,
)

from discrete import stopping_index
from ode_stopping import GradientFlow, LossValue, Quadratic, plots


@pytest.fixture(autouse=True)
def every_figure() -> Iterator[None]:
    yield from drawn_and_closed()


def test_sweep_and_tangents() -> None:
    values = np.linspace(0.5, 2.0, 4)
    times, slopes = plots.sweep(decay, values)
    np.testing.assert_allclose(times, [decay_time(v) for v in values], rtol=1e-6)
    np.testing.assert_allclose(slopes, [-decay_time(v) / v for v in values], rtol=1e-5)
    assert not times.requires_grad
    assert not slopes.requires_grad
    axes = plots.plot_sensitivity(values, times, slopes, label="T", tangent_length=0.2)
    curve, tangents = axes.get_lines()
    np.testing.assert_allclose(data(curve), np.stack([values, times.numpy()], axis=-1))
    pieces = data(tangents).reshape(4, 3, 2)[:, :2]
    ends = pieces[:, 1] - pieces[:, 0]
    np.testing.assert_allclose(ends[:, 0], 0.2)
    np.testing.assert_allclose(ends[:, 1] / ends[:, 0], slopes)
    np.testing.assert_allclose(pieces.mean(axis=1), data(curve))
    # What fits between neighbours, and does not stretch the axis.
    fitted = data(plots.plot_sensitivity(values, times, 1e6 * slopes).get_lines()[1])
    assert np.nanmax(fitted) < 2.0 * float(times.max())


def test_a_sweep_over_misses() -> None:
    times, slopes = plots.sweep(lambda rate: decay(rate, max_time=decay_time()), [0.5, 1.5])
    assert times[0] == math.inf
    assert math.isnan(slopes[0])
    assert float(times[1]) == pytest.approx(decay_time(1.5))
    censored = [decay(rate, max_time=2.0, censored="horizon") for rate in (0.5, 1.5)]
    for given in (times, censored):
        axes = plots.plot_sensitivity([0.5, 1.5], given, slopes)
        assert math.isnan(axes.get_lines()[0].get_ydata()[0])
        (cross,) = with_marker(axes, "x")
        assert list(cross.get_xdata()) == [0.5]
    diverging, _ = plots.sweep(lambda step: euler(step=step), [0.1, 1e3])
    assert diverging.tolist() == [euler().index, math.inf]
    plots.plot_sensitivity([1.0, 2.0], [math.inf, math.inf], [math.nan, math.nan])


def test_a_sweep_without_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="no gradient to theta"):
        plots.sweep(lambda rate: decay(float(rate.detach())), [1.0])
    with pytest.raises(ValueError, match="must have shape"):
        plots.plot_sensitivity([1.0, 2.0], [1.0, 2.0], [1.0])


def test_sensitivity_of_results_says_what_they_are() -> None:
    axes = plots.plot_sensitivity([0.1, 0.2], [euler(0.1), euler(0.2)])
    assert axes.get_ylabel() == "stopping index N (steps)"
    assert axes.get_lines()[0].get_ydata().tolist() == [euler(0.1).index, euler(0.2).index]


def test_energy() -> None:
    runs = {"flow": circle(), "Euler": circle(stopping_index)}
    axes = plots.plot_energy(None, runs, energy=energy)
    flow, dots = axes.get_lines()
    assert axes.get_yscale() == "log"
    np.testing.assert_allclose(flow.get_ydata(), 1.625, rtol=1e-6)
    k = np.arange(31)
    np.testing.assert_allclose(data(dots), np.stack([0.1 * k, 1.625 * 1.01**k], axis=-1))
    own = LossValue(LOSS)
    own.energy = energy  # type: ignore[assignment]
    np.testing.assert_allclose(plots.plot_energy(own, circle()).get_lines()[0].get_ydata(), 1.625)
    assert plots.plot_energy(own, circle(), energy=lambda t, s: -t).get_yscale() == "linear"
    with pytest.raises(TypeError, match="no energy"):
        plots.plot_energy(LOSS, circle())


def test_phase() -> None:
    axes = plots.plot_phase(circle(), coordinate=1)
    curve = data(axes.get_lines()[2])
    t = np.linspace(0.0, 3.0, len(curve))
    np.testing.assert_allclose(np.hypot(*curve.T), 1.5, rtol=1e-6)
    assert curve[-1] == pytest.approx([1.5 * math.cos(t[-1]), -1.5 * math.sin(t[-1])], rel=1e-6)
    diagonal = data(plots.plot_phase(circle(), direction=torch.ones(2)).get_lines()[2])
    np.testing.assert_allclose(np.hypot(*diagonal.T), 2.5 / math.sqrt(2.0), rtol=1e-6)
    with pytest.raises(TypeError, match=r"states \(x, v\)"):
        plots.plot_phase(decay())
    with pytest.raises(ValueError, match="direction must be"):
        plots.plot_phase(circle(), direction=torch.zeros(2))


def test_states() -> None:
    lines = decay().trajectory.plot().get_lines()
    for line, x in zip(lines, START, strict=True):
        np.testing.assert_allclose(line.get_ydata(), x * np.exp(-line.get_xdata()), rtol=1e-6)
    run = euler()
    (second,) = plots.plot_states(run, coordinates=[1]).get_lines()
    np.testing.assert_allclose(second.get_ydata(), 1.5 * 0.9 ** np.arange(run.index + 1))
    with pytest.raises(RuntimeError, match="states were not kept"):
        decay(gradient=None).trajectory.plot()


def test_fan() -> None:
    runs = {0.05: euler(0.05), 0.2: euler(0.2), 0.1: euler(0.1, max_steps=5)}
    axes = plots.plot_fan(decay(), runs, target=TARGET)
    assert labels(axes) == ["target 0.1", "flow", "h = 0.2", "h = 0.1", "h = 0.05"]
    named = {line.get_label(): line for line in axes.get_lines()}
    assert named["flow"].get_color() == "black"
    np.testing.assert_allclose(named["h = 0.1"].get_xdata(), 0.1 * np.arange(6))
    np.testing.assert_allclose(named["h = 0.2"].get_ydata()[:3], 3.25 * 0.64 ** np.arange(3))
    second = plots.plot_fan(decay(), [euler(0.2)], coordinate=1).get_lines()
    assert data(second[0])[0].tolist() == [0.0, START[1]]
    assert second[2].get_ydata()[1] == pytest.approx(0.8 * START[1])
    with pytest.raises(TypeError, match="stopping_index"):
        plots.plot_fan(decay(), [decay()])


def test_spectrum() -> None:
    turning = plots.flow_spectrum(lambda t, s: (s[1], -4.0 * s[0]), 0.0, circle().state)
    np.testing.assert_allclose(np.sort(turning.imag), [-2.0, -2.0, 2.0, 2.0], rtol=1e-12)
    flow = GradientFlow(Quadratic(torch.tensor([1.0, 4.0], dtype=F64)))
    found = plots.flow_spectrum(flow, 0.0, start())
    np.testing.assert_allclose(found.real, [-4.0, -1.0])
    axes = plots.plot_spectrum(found, label="flow", step=0.1)
    disc, points = axes.get_lines()[2:]
    np.testing.assert_allclose(np.abs(1.0 + 0.1 * (data(disc) @ [1.0, 1.0j])), 1.0)
    np.testing.assert_allclose(data(points), [[-4.0, 0.0], [-1.0, 0.0]])
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    points = plots.plot_spectrum(matrix).get_lines()[-1]
    np.testing.assert_allclose(np.sort(data(points)[:, 1]), [-1.0, 1.0])
    with pytest.raises(ValueError, match="square matrix"):
        plots.plot_spectrum(torch.ones(2, 3))
    with pytest.raises(ValueError, match="does not depend"):
        plots.flow_spectrum(lambda t, x: torch.ones(2, dtype=F64), 0.0, start())
    with pytest.raises(ValueError, match="2001 entries"):
        plots.flow_spectrum(lambda t, x: -x, 0.0, torch.zeros(2001))
