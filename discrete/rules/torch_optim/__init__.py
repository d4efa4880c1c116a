"""Optimisers of torch.optim as update rules with derivatives."""
