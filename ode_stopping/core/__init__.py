"""What both sides share: states, functions on flat vectors, leaves, statuses, guards."""
