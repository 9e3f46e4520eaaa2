"""How the ends of a gang's connection get to know each other: who it is, and a secret of both.

dialler ── HELLO {who, version, nonce} ──▶ acceptor
        ◀─ PROOF {nonce, proof} ──────────         or FAILED {message}
        ── PROOF {proof} ────────────────▶
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import quire
from quire.cluster.proof import NONCE_BYTES, prove, proves
from quire.engine.parallel.channel import Channel, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

HELLO_S = 5.0


class Refused(Exception):
    """The other side says why it will have nothing to do with this one."""


def introduce(channel: Channel, secret: str, **who: int) -> str:
    """Say who this is; returns a key that both sides know now, and nobody else.

    Raises Refused, OSError, EOFError, ValueError.
    """
    channel.set_timeout(HELLO_S)
    mine = secrets.token_bytes(NONCE_BYTES)
    channel.send_json(Kind.HELLO, {**who, "version": quire.__version__, "nonce": mine.hex()})
    kind, payload = channel.receive(max_bytes=4096)
    if kind is Kind.FAILED:
        raise Refused(payload.decode(errors="replace")[:500])
    reply = channel.parse(kind, payload, Kind.PROOF)
    nonces = mine, bytes.fromhex(str(reply["nonce"]))
    if not proves(bytes.fromhex(str(reply["proof"])), secret, "acceptor", nonces):
        raise Refused("it does not know this cluster's token")
    channel.send_json(Kind.PROOF, {"proof": prove(secret, "dialler", *nonces).hex()})
    channel.set_timeout(None)
    return prove(secret, "key", *nonces).hex()


def receive(channel: Channel, secret_of: Callable[[dict[str, Any]], str]) -> dict[str, Any] | None:
    """Who is at the other end, with the "key" that both sides know now; None for whoever does not
    know the secret, or speaks otherwise. `secret_of` raises LookupError for who is not expected."""
    channel.set_timeout(HELLO_S)
    try:
        hello = channel.receive_json(Kind.HELLO)
        if hello["version"] != quire.__version__:
            said = f"this is quire {hello['version']}, rank 0 is {quire.__version__}"
            channel.send(Kind.FAILED, f"{said}: install the same on every host".encode())
            return None
        secret = secret_of(hello)
        mine = secrets.token_bytes(NONCE_BYTES)
        nonces = bytes.fromhex(str(hello["nonce"])), mine
        proof = prove(secret, "acceptor", *nonces).hex()
        channel.send_json(Kind.PROOF, {"nonce": mine.hex(), "proof": proof})
        answer = channel.receive_json(Kind.PROOF)
        if not proves(bytes.fromhex(str(answer["proof"])), secret, "dialler", nonces):
            return None
    except (OSError, EOFError, ValueError, LookupError, TypeError):
        return None
    channel.set_timeout(None)
    return hello | {"key": prove(secret, "key", *nonces).hex()}
