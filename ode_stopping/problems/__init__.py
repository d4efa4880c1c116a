"""Objectives with their gradients and constants, and data for them."""

from ode_stopping.problems.base import Objective, Problem, objective_gradient
from ode_stopping.problems.datasets import breast_cancer, digits, synthetic_logistic
from ode_stopping.problems.libsvm import available_libsvm, libsvm
from ode_stopping.problems.linear_models import LinearModel, LogisticRegression, SmoothSVM
from ode_stopping.problems.module_objective import ModuleObjective
from ode_stopping.problems.quadratic import Quadratic, QuarticQuadratic
from ode_stopping.problems.rosenbrock import Rosenbrock
from ode_stopping.problems.rotations import (
    HouseholderRotation,
    geometric_spectrum,
    random_rotation,
)

__all__ = [
    "HouseholderRotation",
    "LinearModel",
    "LogisticRegression",
    "ModuleObjective",
    "Objective",
    "Problem",
    "Quadratic",
    "QuarticQuadratic",
    "Rosenbrock",
    "SmoothSVM",
    "available_libsvm",
    "breast_cancer",
    "digits",
    "geometric_spectrum",
    "libsvm",
    "objective_gradient",
    "random_rotation",
    "synthetic_logistic",
]
