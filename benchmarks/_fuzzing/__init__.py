"""The parts of `fuzz.py`: random problems, the oracle, and the counts."""
