"""The engine: scheduler and block pool, one model runner, and the loop that steps them."""
