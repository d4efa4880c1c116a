"""Draws the picture of the README: Theorem 2 measured on four problems.

python docs/pictures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ode_stopping import Torchdiffeq
from theory_checks import convergence_study
from theory_checks.checks._problems import Setup, build
from theory_checks.files import require_writable, run_script, write_atomically
from theory_checks.plotting import new_figure, slope_plot, style, to_png

IMAGES = Path(__file__).parent / "images"
# The settings of the checks theorem-2-*.
PROBLEMS = {
    "rotated quadratic, d = 100": Setup("quadratic", 1e-3, dim=100, condition=100.0),
    "quartic, d = 20": Setup("quartic", 1e-2, dim=20, condition=10.0),
    "logistic regression, breast cancer": Setup("logistic", 1e-3),
    "smooth SVM, digits 0/1": Setup("svm", 3.0),
}


def main() -> None:
    """Run the four studies and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=12, help="step sizes a problem")
    options = parser.parse_args()
    require_writable(IMAGES)
    torch.set_num_threads(1)
    series = {}
    for name, setup in PROBLEMS.items():
        problem = build(setup)
        largest = 0.4 / problem.stiffness
        steps = largest * np.logspace(0, -1.5, options.points)
        study = convergence_study(
            problem.flow,
            problem.x0,
            problem.criterion,
            problem.target,
            steps=steps.tolist(),
            solver=Torchdiffeq(rtol=1e-8),
        )
        series[name] = (study.h, study.gradient_errors, study.slope)
        print(name, study.slope)
    with style():
        figure, axes = new_figure(2, 2, width=3.9, height=2.7)
        for one, (name, (h, errors, slope)) in zip(axes.flat, series.items(), strict=True):
            slope_plot(
                one, h, {"slope": (errors, slope)}, "step size h", "relative error of h dN/dθ"
            )
            one.set_title(name)
    write_atomically(IMAGES / "convergence.png", to_png(figure, dpi=110))


if __name__ == "__main__":
    run_script(main)
