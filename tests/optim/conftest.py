import importlib
import importlib.metadata
import importlib.util

import pytest


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # Triton looks at it as the functions are made
        module = importlib.reload(importlib.import_module("stacey_dist.optim.kernels.triton"))
        yield module.TritonKernel()
