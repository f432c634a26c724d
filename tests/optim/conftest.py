import contextlib
import importlib
import importlib.metadata
import importlib.util

import pytest


@pytest.fixture(scope="module")
def triton_kernel():
    """The Triton kernel under Triton's interpreter, on the CPU."""
    version = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "3.6"
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        pytest.skip("the interpreter of Triton before 3.6 lacks operations of the kernel, and rounds fma twice")
    with triton_module(interpreted=True) as module:
        yield module.TritonKernel()


@contextlib.contextmanager
def triton_module(interpreted):
    """The kernel's module, made anew with functions for Triton's interpreter or for its compiler."""
    module = importlib.import_module("stacey_dist.optim.kernels.triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))  # Triton looks at it as functions are made
        yield importlib.reload(module)
    importlib.reload(module)
