"""Whose prefixes a request can share: its API key's, and of those the ones with its `cache_salt`.

What a client sends only divides its tenant's cache further. Every salt is a digest that its
tenant's goes into, so nothing that a client can write leads to another tenant's blocks.
"""

from __future__ import annotations

from hashlib import blake2b

SALT_BYTES = 16


def tenant_salt(key_digest: bytes) -> bytes:
    """The salt of an API key."""
    return blake2b(key_digest, digest_size=SALT_BYTES, person=b"quire tenant").digest()


def request_salt(tenant: bytes, cache_salt: str | None) -> bytes:
    """The salt of a request: its tenant's (b"" without API keys), divided by what it asks for."""
    if cache_salt is None:
        return tenant
    chosen = cache_salt.encode()
    return blake2b(chosen, key=tenant, digest_size=SALT_BYTES, person=b"quire request").digest()
