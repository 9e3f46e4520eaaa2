"""Addresses of arrays, as the library takes them: asked for many times a step."""

from __future__ import annotations

import numpy as np


def address(array: np.ndarray) -> int:
    """What `array.ctypes.data` is, without the objects made for that: several times faster."""
    at: int = array.__array_interface__["data"][0]
    return at


class Pointers:
    """Addresses of arrays in the type the library reads, kept alive for the call."""

    def __init__(self) -> None:
        self._alive: list[np.ndarray] = []

    def to(self, array: np.ndarray, dtype: np.dtype) -> int:
        """The address of a contiguous array of this type: the array itself, or a copy."""
        # asked first: numpy takes its time to find that a record type is the same
        if array.dtype is not dtype or not array.flags.c_contiguous:
            array = np.ascontiguousarray(array, dtype)
        self._alive.append(array)
        return address(array)
