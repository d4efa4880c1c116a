"""x(t): methods, adaptive steps, their errors, the trajectory. Knows no criterion."""
