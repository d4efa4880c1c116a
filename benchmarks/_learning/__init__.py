"""The study of learned optimisers: what is trained, its rivals, and the tables."""
