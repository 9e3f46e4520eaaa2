"""Proof of a shared secret over a fresh connection, both ways.

    dialler   -> nonce a                             acceptor
              <- nonce b, proof
              -> proof

A proof is HMAC-SHA256 under the secret, so that the secret itself never travels and each side
learns that the other knows it. Where there is no secret the proofs are made with an empty key.
"""

from __future__ import annotations

import hashlib
import hmac

NONCE_BYTES = 32


def prove(secret: str, role: str, dialler: bytes, acceptor: bytes) -> bytes:
    """That the side in this role knows the secret: over both sides' nonces."""
    text = b"quire " + role.encode() + dialler + acceptor
    return hmac.digest(secret.encode(), text, hashlib.sha256)


def proves(proof: bytes, secret: str, role: str, nonces: tuple[bytes, bytes]) -> bool:
    """The proof of the side in this role holds; nonces of dialler and acceptor. Takes the same time
    whatever differs."""
    full = all(len(nonce) == NONCE_BYTES for nonce in nonces)
    return hmac.compare_digest(proof, prove(secret, role, *nonces)) and full
