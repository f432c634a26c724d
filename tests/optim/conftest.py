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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # Triton looks at it as the functions are made
        module = importlib.reload(importlib.import_module("stacey_dist.optim.kernels.triton"))
        yield module.TritonKernel()
