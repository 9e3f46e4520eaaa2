"""Mutual TLS between the processes of a cluster, for plain sockets."""

from __future__ import annotations

import ssl
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    from quire.config.cluster import ClusterConfig

READ_BYTES = 64 << 10


def tls_context(
    config: ClusterConfig, *, server: bool, by_name: bool = False
) -> ssl.SSLContext | None:
    """Mutual TLS under the cluster's authority, None without certificates.

    `by_name`: who connects checks that the certificate is for the name or address that it dialled,
    as gRPC does. Otherwise, and to who is connected to, a pod is who holds a certificate of the
    authority, at whatever address. Raises OSError when a file cannot be read.
    """
    if config.cluster_tls_cert is None:
        return None
    purpose = ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH
    context = ssl.create_default_context(purpose, cafile=config.cluster_tls_ca)
    context.load_cert_chain(config.cluster_tls_cert, config.cluster_tls_key)
    context.check_hostname = by_name
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class TlsStream:
    """A blocking TLS stream that one thread may read while another writes.

    `ssl.SSLSocket` does not allow that: its state is shared, and a read that waits would hold it.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        """Shake hands. Raises OSError, of which ssl.SSLError is one."""
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._state = threading.Lock()
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                sock.sendall(self._outgoing.read())
                if not self._feed():
                    raise ConnectionResetError("the other side ended the handshake") from None
            else:
                break
            finally:
                if self._outgoing.pending:  # the last message, or an alert
                    sock.sendall(self._outgoing.read())

    @property
    def has_pending(self) -> bool:
        """Something was taken from the socket and not been read from here."""
        with self._state:
            return bool(self._tls.pending() or self._incoming.pending)

    def sendall(self, data: bytes) -> None:
        """One thread at a time."""
        with self._state:
            self._tls.write(data)
            record = self._outgoing.read()
        self._sock.sendall(record)

    def recv_into(self, view: memoryview) -> int:
        """Bytes that were put into the view, 0 at the end of the stream. One thread at a time."""
        while True:
            try:
                with self._state:
                    return self._tls.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                if not self._feed():
                    return 0
            except ssl.SSLZeroReturnError:
                return 0

    def _feed(self) -> bool:
        data = self._sock.recv(READ_BYTES)
        with self._state:
            self._incoming.write(data)
        return bool(data)
