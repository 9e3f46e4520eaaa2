"""`quire collect-env`: this machine and installation, for a bug report. Secrets are masked."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import quire
from quire.config.base import check_fields
from quire.config.flags import Command, parse
from quire.config.option import option

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "triton",
    "grpcio", "protobuf", "starlette", "uvicorn", "uvloop", "httptools", "msgspec",
    "jinja2", "prometheus-client", "httpx2",
)  # fmt: skip
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip
VARIABLES = re.compile(
    r"(QUIRE|OMP|MKL|KMP|GOMP|CUDA|NVIDIA|NCCL|UCX|HF|HUGGING_FACE|TORCH|TRITON|OTEL|PYTORCH)_\w+"
    r"|LD_PRELOAD|LD_LIBRARY_PATH|VIRTUAL_ENV|MALLOC_\w+|TOKENIZERS_PARALLELISM"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|HEADERS|AUTH", re.IGNORECASE)
URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What is collected."""

    quick: bool = option(False, "collection")
    """Leave out what takes seconds: torch's view of the GPUs."""

    def __post_init__(self) -> None:
        check_fields(self)


COMMAND = Command(
    prog="quire collect-env",
    summary="Describe this machine and installation for a bug report.",
    owners=(CollectConfig,),
)


def run(argv: Sequence[str]) -> int:
    """Print the description; returns the exit code."""
    config = parse(COMMAND, argv, os.environ).get(CollectConfig)
    sections = {
        "Versions": versions(),
        "System": system(),
        "CPU kernels": cpu_kernels(),
        "GPUs": gpus(),
        "Environment": environment(os.environ),
    }
    if not config.quick:
        sections["torch"] = torch_view()
    for title, lines in sections.items():
        print(f"{title}:")
        for line in lines:
            print(f"  {line}")
    return 0


def versions() -> Iterator[str]:
    """Quire, Python, and the packages it stands on."""
    yield f"quire {quire.__version__} ({Path(quire.__file__).parent})"
    yield f"python {platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name}: not installed"


def system() -> Iterator[str]:
    """Operating system, processor and memory, as far as this process may use them."""
    yield f"{platform.platform()} ({platform.machine()}), libc {' '.join(platform.libc_ver())}"
    info = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info)
    yield f"CPU: {model[1] if model else platform.processor() or 'unknown'}"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _read("/sys/fs/cgroup/cpu.max").strip() or "none"
    yield f"CPUs: {usable} usable of {os.cpu_count()}, cgroup quota {quota}"
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    yield f"instructions: {' '.join(f for f in CPU_FLAGS if f in have) or 'unknown'}"
    memory = dict(
        re.findall(r"(MemTotal|MemAvailable|HugePages_Total):\s*(\d+)", _read("/proc/meminfo"))
    )
    if "MemTotal" in memory:
        total, free = (int(memory.get(k, 0)) / 2**20 for k in ("MemTotal", "MemAvailable"))
        limit = _read("/sys/fs/cgroup/memory.max").strip() or "none"
        yield f"memory: {total:.1f} GiB, {free:.1f} GiB available, cgroup limit {limit}"
    yield f"huge pages: {_read('/sys/kernel/mm/transparent_hugepage/enabled').strip() or 'unknown'}"
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shm is not None:
        yield f"/dev/shm: {shm.free / 2**30:.1f} GiB free of {shm.total / 2**30:.1f} GiB"


def cpu_kernels() -> Iterator[str]:
    """Whether the compiled CPU kernels load, and what they run on."""
    try:
        from quire.kernels.cpu import library

        yield f"{library.LIBRARY}: {library.isa()} of {', '.join(library.available_isas())}"
    except (ImportError, RuntimeError, ValueError) as error:
        yield f"not usable: {error}"


def gpus() -> Iterator[str]:
    """What the driver says."""
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
        )  # fmt: skip
    except FileNotFoundError:
        yield "none (no nvidia-smi)"
    except (OSError, subprocess.SubprocessError) as error:
        yield f"nvidia-smi failed: {error}"
    else:
        yield from done.stdout.strip().splitlines() or ["none"]


def torch_view() -> Iterator[str]:
    """What torch was built for and can use."""
    try:
        import torch
    except ImportError as error:
        yield f"not importable: {error}"
        return
    yield f"CUDA build: {torch.version.cuda or 'no'}, usable: {torch.cuda.is_available()}"
    yield f"CPU capability: {torch.backends.cpu.get_cpu_capability()}"
    yield f"threads: {torch.get_num_threads()}"


def environment(environ: Mapping[str, str]) -> Iterator[str]:
    """Variables that change what we do; values that may be secrets are masked."""
    found = False
    for name in sorted(environ):
        if VARIABLES.fullmatch(name):
            found = True
            yield f"{name}={mask(name, environ[name])}"
    if not found:
        yield "nothing of ours is set"


def mask(name: str, value: str) -> str:
    """The value, or stars when the name says that it is a secret; passwords in URLs go too."""
    if SECRET.search(name) and value and name != "TOKENIZERS_PARALLELISM":
        return "***"
    return URL_PASSWORD.sub("***", value)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
