"""Tensor parallelism: one model over several processes. Imported only when asked for."""
