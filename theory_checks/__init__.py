"""Checks that the code does what the theorems say."""
