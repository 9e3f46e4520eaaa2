"""Builds the CPU kernels: one shared object with a plain C ABI, loaded with ctypes.

No Python and no torch headers are involved. Files named `*_<isa>.cpp` are compiled with that
instruction set's flags where machine and compiler know them; which of them the processor can run
is decided when the library is loaded. Everything else about the package is in pyproject.toml.

Where no compiler works the package installs without the library and runs on torch, slower.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

# Through the link: a checkout or archive that lost it must not build a package without kernels.
SOURCES = Path("services/quire/kernels/csrc/cpu")

BASE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    # A product and a sum are fused where the source says so, or results would depend on inlining.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors wider than the target's registers are passed between inlined functions
    "-Wno-uninitialized",  # GCC 12 about its own AVX-512 headers
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",  # Clang about the above
]

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_FLAGS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512vnni", "-mavx512bf16"],
    "amx": [*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}

WITHOUT_LIBRARY = """
************************************************************************************************
The CPU kernels were not built:
    {reason}
Quire works without them on a GPU. On a CPU it falls back to torch: several times slower, and
results then depend on which requests share a batch. To get the kernels, install a C++17 compiler
(GCC 11 or Clang 14 at least: `apt-get install g++`) and install this package again.
************************************************************************************************
"""


BUILD_ERRORS = (BaseError, CCompilerError, OSError)


def isa_of(source: Path) -> str | None:
    """The instruction set a source's name ends in, the longest that matches."""
    names = [isa for isa in X86_FLAGS if source.stem.endswith(f"_{isa}")]
    return max(names, key=len, default=None)


class BuildKernels(build_ext):
    """Compiles each source with its own flags, several at a time."""

    def run(self) -> None:
        """Build, or say clearly what is lost and go on."""
        try:
            super().run()
        except BUILD_ERRORS as error:
            if os.environ.get("QUIRE_REQUIRE_CPU_KERNELS"):
                raise
            sys.stderr.write(WITHOUT_LIBRARY.format(reason=error))
            self.extensions = []  # or an editable install looks for the file

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the library does not depend on one."""
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, _ext: Extension) -> list[str]:
        """The C functions are exported by default; there is no module init function."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Probe the instruction sets, compile in parallel, link."""
        if self.compiler.compiler_type != "unix":
            raise CompileError("needs a compiler with GCC's options")
        isas = [isa for isa in self._candidate_isas() if self._compiles(X86_FLAGS[isa])]
        defines = [f"-DQUIRE_HAVE_{isa.upper()}" for isa in isas]
        sources = [s for s in map(Path, ext.sources) if isa_of(s) in (None, *isas)]

        def compile_one(source: Path) -> list[str]:
            isa = isa_of(source)
            flags = [*BASE_FLAGS, *defines, *(X86_FLAGS[isa] if isa else [])]
            return self.compiler.compile(
                [str(source)], output_dir=self.build_temp, extra_postargs=flags
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for compiled in pool.map(compile_one, sources) for o in compiled]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread"], target_lang="c++"
        )

    def _candidate_isas(self) -> list[str]:
        return list(X86_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else []

    def _compiles(self, flags: list[str]) -> bool:
        """Whether the compiler knows these flags."""
        probe = Path(self.build_temp) / "probe.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("int probe() { return 0; }\n")
        try:
            self.compiler.compile(
                [str(probe)], output_dir=self.build_temp, extra_postargs=["-std=c++17", *flags]
            )
        except BUILD_ERRORS:
            return False
        return True


def kernel_sources() -> list[str]:
    """Every C++ source of the CPU kernels; raises where the link to them is lost."""
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise FileNotFoundError(f"{SOURCES}: services/quire/kernels must link to ../../kernels")
    return [str(source) for source in sources]


def kernel_headers() -> list[str]:
    """What a change of which must rebuild the library."""
    return [str(header) for header in sorted(SOURCES.glob("*.h"))]


setup(
    ext_modules=[
        Extension(
            "quire.kernels.libquire_cpu",
            sources=kernel_sources(),
            depends=kernel_headers(),
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
