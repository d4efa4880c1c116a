"""The race of optimisers on the smooth support vector machine (Figures 4 and 6)."""
