"""Model families: configuration, wiring, weights."""
