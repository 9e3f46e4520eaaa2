"""Addresses of arrays, as the library takes them: asked for many times a step."""

from __future__ import annotations

import ctypes

import numpy as np


def address(array: np.ndarray) -> int:
    """What `array.ctypes.data` is, several times faster: without the objects made for that."""
    flags = array.flags
    if flags.c_contiguous and flags.writeable and array.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    if array.dtype.names is not None:
        array = array.view(np.uint8)  # or numpy describes every field of the record
    at: int = array.__array_interface__["data"][0]
    return at


class Pointers:
    """Addresses of arrays in the type the library reads, which live as long as this does."""

    def __init__(self) -> None:
        self._alive: list[np.ndarray] = []

    def keep(self, array: np.ndarray) -> None:
        """Let an array live as long, whose address is known."""
        self._alive.append(array)

    def of(self, array: np.ndarray) -> int:
        """The address of the array itself."""
        self.keep(array)
        return address(array)

    def to(self, array: np.ndarray, dtype: np.dtype) -> int:
        """The address of a contiguous array of this type: the array itself, or a copy."""
        # asked first: numpy takes its time to find that a record type is the same
        if array.dtype is not dtype or not array.flags.c_contiguous:
            array = np.ascontiguousarray(array, dtype)
        return self.of(array)
