"""The two sides of a disaggregated prefill. A worker has both; its role says how much of each."""
