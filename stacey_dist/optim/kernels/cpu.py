"""Call cpu.cpp, compiled at installation for each instruction set of the processor family (setup.py)."""

import array
import ctypes
import functools
import hashlib
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stacey_dist.optim.kernels import Call, NoKernelError, Row, apart
from stacey_dist.optim.kernels.constants import VARIANTS, float_constants, power_kind

# By torch.backends.cpu.get_cpu_capability(): the library's name and a human-readable one. torch's AVX2 includes FMA3.
INSTRUCTION_SETS = {"AVX512": ("avx512", "AVX-512"), "AVX2": ("avx2", "AVX2")}
PORTABLE = ("portable", "any processor")


class _Settings(ctypes.Structure):
    """Mirror `Settings` in cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("variant", "power", "mirror_is_plain", "alpha_is_zero")),
        *((name, ctypes.c_int32) for name in ("stochastic", "has_scale")),
        *((name, ctypes.c_int32) for name in ("weight_dtype", "gradient_dtype", "state_dtype")),
        ("seed", ctypes.c_uint64),
        ("numbers", ctypes.c_float * 20),  # `float_constants`
        ("inverse_scale", ctypes.c_float),
    )


class CpuKernel:
    """cpu.cpp for one instruction set: its part of the library's name, and a human-readable name.

    Raises NoKernelError if the library is not there or can't be loaded.
    """

    def __init__(self, instruction_set: str, name: str) -> None:
        self.name = f"C++ for {name}"
        self._step = _find(f"_cpu_{instruction_set}")

    def __call__(self, rows: list[Row], call: Call) -> None:
        """See `Kernel`."""
        s, first = call.settings, rows[0]
        settings = _Settings(
            variant=VARIANTS.index(s.variant),
            power=power_kind(s),
            mirror_is_plain=s.p == 2.0,
            alpha_is_zero=s.alpha == 0.0,
            stochastic=call.stochastic,
            has_scale=call.grad_scale is not None,
            weight_dtype=first.weight.dtype == torch.bfloat16,
            gradient_dtype=first.gradient.dtype == torch.bfloat16,
            state_dtype=first.z.dtype == torch.bfloat16,
            seed=call.seed & 0xFFFFFFFFFFFFFFFF,
            inverse_scale=0.0 if call.grad_scale is None else float(call.grad_scale.double().reciprocal()),
            numbers=tuple(float_constants(s).values()),
        )
        for launched, addresses in apart(rows, [row.weight.data_ptr() for row in rows]):
            table = array.array("q")
            for (weight, gradient, z, m, step), address in zip(launched, addresses, strict=True):
                table.extend(
                    (address, gradient.data_ptr(), z.data_ptr(), m.data_ptr(), step.data_ptr(), weight.numel())
                )
            self._step(ctypes.byref(settings), table.buffer_info()[0], len(launched), torch.get_num_threads())
        torch.autograd.graph.increment_version([row.weight for row in rows])  # as torch's operations in place do


def _find(name: str) -> Callable[..., Any]:
    """Return the function of the library of this name that was compiled from the cpu.cpp here."""
    # A program started in the source tree imports the package from there, but the compiled library is in the installed
    # package.
    here = Path(__file__).parent
    digest = hashlib.sha256((here / "cpu.cpp").read_bytes()).hexdigest()
    outdated = None
    for directory in (here, *(Path(entry) / "stacey_dist/optim/kernels" for entry in sys.path)):
        file = directory / f"{name}.so"
        if file.exists():
            library = _load(file)
            if library.stacey_source() == digest.encode():
                return library.stacey_step
            outdated = file
    if outdated is not None:
        raise NoKernelError(f"{outdated} was compiled from another version's source; install stacey_dist again")
    raise NoKernelError(
        f"the C++ kernel ({name.removeprefix('_cpu_')}) was not compiled at installation; install a C++ compiler with "
        "OpenMP (gcc), then stacey_dist again"
    )


def _load(path: Path) -> ctypes.CDLL:
    # Linked to no OpenMP: it is to use the threads that torch has, not others beside them on the same cores. torch
    # makes its symbols visible to all, if it was built with GNU's.
    try:
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernelError(f"{path.name} can't be loaded: {error}") from error
    library.stacey_source.restype = ctypes.c_char_p
    library.stacey_step.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    library.stacey_step.restype = None
    return library


@functools.cache
def find() -> CpuKernel:
    """Return the fastest kernel that this processor and torch's settings allow, or raise NoKernelError."""
    if platform.system() != "Linux":
        raise NoKernelError(f"the C++ kernel is compiled on Linux only, not on {platform.system()}")
    return CpuKernel(*INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), PORTABLE))
