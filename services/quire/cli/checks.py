"""What `quire doctor` looks at on this machine: what it finds, and what to change."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

Level = Literal["ok", "warn", "fail"]

GIB = 1 << 30
MIN_MEMORY, MIN_SHM = 4 * GIB, 1 * GIB
MIN_FILES = 4096
PORTS = {8000: "quire serve --port", 9000: "quire worker --listen", 9100: "quire router --listen"}
TIMEOUT_S = 30
_NIXL = """
import logging, sys
logging.disable(logging.CRITICAL)
from nixl_cu12._api import nixl_agent, nixl_agent_config
out = sys.stdout; sys.stdout = sys.stderr
names = nixl_agent("doctor", nixl_agent_config(backends=[])).get_plugin_list()
print("backends", *sorted(names), file=out)
"""
_TORCH = """
import torch
usable = torch.cuda.is_available()
print(torch.__version__, "built for CUDA", torch.version.cuda or "no", "usable" if usable else "")
try:
    import triton
    print("triton", triton.__version__)
except ImportError:
    print("no triton")
"""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    level: Level
    found: str
    advice: str = ""
    """What to change; empty when all is well."""


def machine() -> Iterator[Check]:
    """Every check of this machine, in the order in which they are shown."""
    for check in (kernels, cpus, memory, shared_memory, open_files, locked_memory, nixl, gpus):
        yield check()
    yield from map(port, PORTS)


def kernels() -> Check:
    """The compiled CPU kernels, and the instructions they use."""
    name = "CPU kernels"
    try:
        from quire.kernels.cpu import library

        found = f"{library.isa()} of {', '.join(library.available_isas())}"
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        advice = "build them: pip install . with a C++ compiler (g++ 11 or later)"
        return Check(name, "fail", " ".join(str(error).split()), advice)
    if platform.machine() == "x86_64" and library.isa() == "generic":
        return Check(name, "warn", found, "this CPU or QUIRE_CPU_ISA allows no AVX2: slow")
    return Check(name, "ok", found)


def cpus() -> Check:
    """Cores this process may use, against the container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = re.match(r"(\d+) (\d+)", _read("/sys/fs/cgroup/cpu.max"))
    found = f"{usable} usable of {os.cpu_count()}"
    if quota is None:
        return Check("CPUs", "ok", found)
    allowed = int(quota[1]) / int(quota[2])
    found += f", quota {allowed:g}"
    if allowed >= (usable or 1):
        return Check("CPUs", "ok", found)
    advice = f"threads beyond the quota are stopped in mid-step: --num-threads {int(allowed) or 1}"
    return Check("CPUs", "warn", found, advice)


def memory() -> Check:
    """What is left for weights and KV cache."""
    sizes = dict(re.findall(r"(MemTotal|MemAvailable):\s*(\d+)", _read("/proc/meminfo")))
    if len(sizes) < 2:
        return Check("memory", "warn", "unknown on this system", "check it yourself")
    total, free = int(sizes["MemTotal"]) << 10, int(sizes["MemAvailable"]) << 10
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    found = f"{free / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    if limit.isdecimal():
        free = min(free, max(int(limit) - _used_memory(), 0))
        found += f", {free / GIB:.1f} GiB up to the container's limit"
    if free < MIN_MEMORY:
        return Check("memory", "warn", found, "models larger than the demo will not fit")
    return Check("memory", "ok", found)


def _used_memory() -> int:
    used = _read("/sys/fs/cgroup/memory.current").strip()
    return int(used) if used.isdecimal() else 0


def shared_memory() -> Check:
    """/dev/shm: containers get 64 MiB unless told otherwise."""
    if not Path("/dev/shm").is_dir():
        return Check("/dev/shm", "warn", "there is none", "nixl cannot use shared memory")
    free = shutil.disk_usage("/dev/shm").free
    found = f"{free / GIB:.1f} GiB free"
    if free < MIN_SHM:
        advice = "docker run --shm-size=2g; in Kubernetes an emptyDir with medium: Memory"
        return Check("/dev/shm", "warn", found, advice)
    return Check("/dev/shm", "ok", found)


def open_files() -> Check:
    """A gateway has a socket per stream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)}, at most {_limit(hard)}"
    if 0 <= soft < MIN_FILES:
        return Check("open files", "warn", found, f"ulimit -n {MIN_FILES} or more for a gateway")
    return Check("open files", "ok", found)


def locked_memory() -> Check:
    """RDMA pins the pool."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_rdma = Path("/sys/class/infiniband").is_dir()
    found = f"{_limit(soft, 'bytes')}, {'RDMA devices here' if has_rdma else 'no RDMA device'}"
    if has_rdma and soft != resource.RLIM_INFINITY:
        advice = "ulimit -l unlimited; in Kubernetes the capability IPC_LOCK"
        return Check("locked memory", "fail", found, advice)
    return Check("locked memory", "ok", found)


def nixl() -> Check:
    """One-sided transfer. In a process of its own: its libraries may abort."""
    if importlib.util.find_spec("nixl_cu12") is None:
        return Check("nixl", "ok", "not installed; tcp and grpc need nothing (pip: quire[rdma])")
    code, text = _python(_NIXL)
    line = next((x for x in text.splitlines() if x.startswith("backends ")), "")
    if code or "UCX" not in line:
        advice = "leave nixl out of --kv-transports, or mend the installation: quire[rdma]"
        return Check("nixl", "warn", line or _last_line(text), advice)
    return Check("nixl", "ok", line)


def gpus() -> Check:
    """What the driver says, and whether torch can use it."""
    if shutil.which("nvidia-smi") is None:
        return Check("GPUs", "ok", "none (no nvidia-smi): serving on CPU")
    code, text = _run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    if code or not text.strip():
        return Check("GPUs", "fail", _last_line(text), "nvidia-smi fails: mend the driver")
    names = "; ".join(text.strip().splitlines())
    code, view = _python(_TORCH)
    found = f"{names}; torch {' '.join(view.split())}"
    if code or "usable" not in view:
        advice = "torch cannot use them: install a torch build for this driver's CUDA"
        return Check("GPUs", "fail", found, advice)
    if "no triton" in view:
        return Check("GPUs", "warn", found, "pip install triton: the GPU kernels need it")
    return Check("GPUs", "ok", found)


def port(number: int) -> Check:
    """Whether a default port can be listened on."""
    name = f"port {number}"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", number))
        except OSError as error:
            return Check(name, "warn", f"{error.strerror}", f"choose another: {PORTS[number]}")
    return Check(name, "ok", "free")


def _limit(value: int, unit: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value} {unit}".strip()


def _python(code: str) -> tuple[int, str]:
    return _run([sys.executable, "-P", "-c", code])


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and all output; 1 and the reason when it did not run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {TIMEOUT_S} s"
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout + done.stderr


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
