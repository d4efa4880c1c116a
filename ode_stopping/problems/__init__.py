"""Objectives with their gradients and constants, and data for them."""

from .base import Objective, Problem, objective_gradient
from .datasets import breast_cancer, digits, synthetic_logistic
from .libsvm import available_libsvm, libsvm
from .linear_models import LinearModel, LogisticRegression, SmoothSVM
from .module_objective import ModuleObjective
from .quadratic import Quadratic, QuarticQuadratic
from .rosenbrock import Rosenbrock
from .rotations import HouseholderRotation, geometric_spectrum, random_rotation

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
