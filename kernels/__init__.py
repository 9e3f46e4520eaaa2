"""Compute kernels: what the project exists for, each beside its plain torch reference.

Imports nothing else of quire and, at package level, nothing heavy.
"""
