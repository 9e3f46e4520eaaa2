"""Quantized checkpoints: formats read, and rounding of float checkpoints while they load."""
