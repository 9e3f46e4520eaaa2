"""KV blocks from one pod's pool to another's. `base` tells the life cycle of a transfer."""
