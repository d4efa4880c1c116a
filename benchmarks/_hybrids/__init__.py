"""Parts of `hybrids.py`: problems, the oracle (without torch), the library's side, the rows."""
