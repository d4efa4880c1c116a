"""Derivatives of the index: its definitions, the discrete adjoint, and their graph."""
