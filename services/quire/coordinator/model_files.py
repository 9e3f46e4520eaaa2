"""Model files that a pool's nodes must have, and what to change where one has not got them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def local_paths(options: Mapping[str, Any]) -> Iterator[str]:
    """Files or folders that an engine with these options reads on its own host.

    Raises ValueError for a path that means something else on each of them.
    """
    for path in (options.get("model"), options.get("tokenizer")):
        if path is None or not path.startswith(("/", ".", "~")):
            continue  # a hub id, or the demo model
        if not path.startswith("/"):
            raise ValueError(f"model {path}: give an absolute path, it is looked up on each node")
        yield path


def missing(path: str, host: str, pool: str) -> str:
    """What to change where a node has not got it."""
    return (
        f"{path} is not on node {host}: copy it there, or keep pool {pool} off that node with "
        "node-label"
    )
