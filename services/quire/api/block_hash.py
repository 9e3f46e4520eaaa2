"""Hash chain over 16-token blocks: the name under which pods, routers and gateways know a prefix.

    root     = blake2b-128("quire.block.v1" | fingerprint | lora | salt), fields length-prefixed
    hash[i]  = blake2b-128(hash[i - 1] | token ids of block i as little-endian uint32)

A cryptographic hash, because blocks are found across tenants by name alone; the salt in the root
keeps one tenant's prefixes invisible to another, and apart what a tenant wants apart. Equal on
every host and in every process. Only full blocks have a hash.
"""

from __future__ import annotations

import sys
from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BLOCK_SIZE = 16
"""Tokens in a block."""
HASH_BYTES = 16


def root(fingerprint: bytes, lora: str = "", salt: bytes = b"") -> bytes:
    """Parent of a chain's first block: which model, adapter and salt the blocks belong to."""
    state = blake2b(b"quire.block.v1", digest_size=HASH_BYTES)
    for part in (fingerprint, lora.encode(), salt):
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def extend(parent: bytes, token_ids: Sequence[int], start: int = 0) -> list[bytes]:
    """Hashes of the full blocks of `token_ids` from token `start` (a multiple of 16) on.

    `parent` is the hash of the block that ends at `start`, or the root.
    """
    end = len(token_ids) // BLOCK_SIZE * BLOCK_SIZE
    data = _token_bytes(token_ids[start:end])
    hashes = []
    for i in range(0, len(data), 4 * BLOCK_SIZE):
        parent = blake2b(parent + data[i : i + 4 * BLOCK_SIZE], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


def _token_bytes(token_ids: Iterable[int]) -> bytes:
    ids = array("I", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()
