"""Executes step plans: one runner per rank, over one of the backends."""
