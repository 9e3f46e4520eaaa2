"""A Redis of this machine, Debian's."""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING

from manifests import tool
from waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

PORT = 6380
"""Its usual one is that of Ray's head, on every address of the machine."""
PASSWORD = "password-of-a-test"


class Redis:
    """The process, on the loopback address that it is given. A context manager."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self._folder = address, folder

    def __enter__(self) -> Redis:
        self._process = subprocess.Popen(
            [
                tool("redis-server"), "--bind", self.address, "--port", str(PORT),
                "--requirepass", PASSWORD, "--save", "", "--dir", str(self._folder),
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: b"PONG" in self.ask("PING"))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def ask(self, command: str) -> bytes:
        """The answer to one command, as it is sent."""
        try:
            with socket.create_connection((self.address, PORT), timeout=5) as connection:
                connection.sendall(f"AUTH {PASSWORD}\r\n{command}\r\nQUIT\r\n".encode())
                return b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionRefusedError:
            return b""
