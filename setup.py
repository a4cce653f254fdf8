"""Builds the native CPU kernels; everything else is in pyproject.toml.

One shared library without Python in it. Each ``kernels_<isa>.cpp`` is compiled for its own instruction set, the rest
for the baseline, and the choice is made at run time. Without a compiler the package installs all the same and says at
run time that the kernels are missing. ``PACELINE_NATIVE_FLAGS`` adds flags (sanitizers); ``PACELINE_NATIVE=0`` compiles
nothing, for an environment that serves by vLLM only.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/cpu/csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
#: -ffp-contract=off: with contraction, two instantiations of one kernel may round differently, and a row's result
#: would depend on the batch.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
]
FLAGS += ["-Wno-maybe-uninitialized"]  # gcc 12 warns about its own intrinsics headers
AVX512 = [*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "vbmi", "vbmi2")), "-mfma"]
ISA_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_avx512.cpp": AVX512,
    "kernels_amx.cpp": [*AVX512, "-mamx-tile", "-mamx-int8"],
}


class BuildNative(build_ext):
    """Compiles every source with its own flags."""

    def build_extensions(self) -> None:
        """Wrap the compiler so that a source's instruction set is chosen by its name."""
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = [*extra_postargs, *ISA_FLAGS.get(Path(src).name, [])]
            return compile_one(obj, src, ext, cc_args, flags, pp_opts)

        self.compiler._compile = compile_with_isa
        super().build_extensions()

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No PyInit: the library is loaded with ctypes."""
        return []


sources = sorted(p for p in SOURCES.glob("*.cpp") if X86 or p.name not in ISA_FLAGS)
extra = os.environ.get("PACELINE_NATIVE_FLAGS", "").split()
native = Extension(
    "paceline.kernels.cpu._native",
    [str(p) for p in sources],
    depends=[str(p) for p in SOURCES.glob("*.h")],
    define_macros=[("PL_HAVE_X86", "1")] if X86 else [],
    extra_compile_args=[*FLAGS, *extra],
    extra_link_args=["-pthread", *extra],
    language="c++",
    optional=True,
)
unwanted = sys.platform == "win32" or os.environ.get("PACELINE_NATIVE") == "0"
setup(ext_modules=[] if unwanted else [native], cmdclass={"build_ext": BuildNative})
