"""Set before torch is loaded, in the tests' processes and in all that they start."""

import os

import pytest

# Threads that wait for each other sleep: spinning, those of one process would take the cores from those of another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session", autouse=True)
def shared_by_workers(tmp_path_factory):
    """SHARED_BY_WORKERS: a directory of this session that all of pytest's processes share."""
    own = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARED_BY_WORKERS", str(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own))
        yield
