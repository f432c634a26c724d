"""The devices that a test runs on: the same function on the CPU, in CI, and on a GPU with `pytest -m gpu`."""

import pytest

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ("cpu", CUDA)
