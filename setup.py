"""The C++ kernel, once for each instruction set; everything else about the package is in pyproject.toml."""

import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]

# Not linked to OpenMP: see kernels/cpu.py. No -march: what is not asked for must not be used, and no contraction to
# fused multiply-adds: they would give other bits. The hash's integers are to wrap around.
FLAGS = [
    *("-std=c++17", "-O3", "-fwrapv", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"),
    *("-Wno-psabi", "-Wno-maybe-uninitialized"),
]

SOURCE = "stacey_dist/optim/kernels/cpu.cpp"
# A library is used beside the very source that it is of.
DIGEST = hashlib.sha256((Path(__file__).parent / SOURCE).read_bytes()).hexdigest()


class BuildLibraries(build_ext):
    """Build shared libraries that know nothing of Python: ctypes loads them."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name without a Python version in it."""
        return f"{fullname.replace('.', '/')}.so"


class AnyPythonWheel(bdist_wheel):
    """Tag the wheel for every Python 3 on this platform: its libraries use neither Python's nor torch's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tag."""
        return "py3", "none", super().get_tag()[2]


# One after the other: all are compiled into the same object file before they are linked.
setup(
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
    ext_modules=[
        Extension(
            f"stacey_dist.optim.kernels._cpu_{name}",
            sources=[SOURCE],
            define_macros=[("SOURCE", f'"{DIGEST}"')],
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-s"],  # no symbols but the exported ones
            # Without a compiler the installation succeeds, and the plain rule runs.
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
        if sys.platform == "linux"
    ],
)
