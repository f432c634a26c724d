import contextlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from stacey_dist.optim import kernels


def triton_before(*version):
    """Return whether an older Triton than this version is installed."""
    if not importlib.util.find_spec("triton"):
        return False
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < version


@pytest.fixture
def triton_compiler():
    """Skip a test that compiles the kernel without a GPU where Triton's compiler is called in another way."""
    if triton_before(3, 3):
        pytest.skip("the compiler of Triton before 3.3 is called in another way")


@pytest.fixture(scope="module")
def triton_kernel():
    """The Triton kernel under Triton's interpreter, on the CPU."""
    if triton_before(3, 6):
        pytest.skip("the interpreter of Triton before 3.6 lacks operations of the kernel, and rounds fma twice")
    with triton_module(interpreted=True) as module:
        yield module.TritonKernel()


@contextlib.contextmanager
def triton_module(interpreted):
    """A module like the kernel's, with functions for Triton's interpreter or for its compiler."""
    name = f"triton_kernel_{'interpreted' if interpreted else 'compiled'}"
    file = Path(kernels.__file__).with_name("triton.py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))  # Triton looks at it as functions are made
        spec.loader.exec_module(module)
        yield module
