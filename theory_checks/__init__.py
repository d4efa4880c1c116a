"""Checks that the code does what the theorems say."""

from .studies import ConvergenceStudy, convergence_study

__all__ = ["ConvergenceStudy", "convergence_study"]
