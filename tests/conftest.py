"""Set before torch is loaded, in the tests' processes and in all that they start."""

import os
import re

import pytest

# Threads that wait for each other sleep: spinning, those of one process would take the cores from those of another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session", autouse=True)
def shared_by_workers(request, tmp_path_factory):
    """SHARED_BY_WORKERS: a directory of this session that all of pytest's processes share."""
    own = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARED_BY_WORKERS", str(own.parent if hasattr(request.config, "workerinput") else own))
        yield


def pytest_addoption(parser):
    parser.addoption(
        "--core", action="store_true", help="skip what needs a package that the library itself does not need"
    )


def pytest_collection_modifyitems(items):
    import torch

    found = torch.cuda.device_count()  # it does not start CUDA: processes may still be forked
    for item in items:
        for marker in item.iter_markers("gpu"):
            needed = marker.kwargs.get("devices", 1)
            if found < needed:
                reason = f"needs {needed} CUDA devices" if found else "no CUDA device"
                item.add_marker(pytest.mark.skip(reason=reason))
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        for item in items:
            if re.search("fsdp2|hsdp|dtensor", item.name):
                item.add_marker(pytest.mark.skip(reason="fully_shard of torch 2.6 needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    return _skipped_without_its_package(report, collector)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    return _skipped_without_its_package(report, item)


def _skipped_without_its_package(report, node):
    """With --core: turn a failure for want of a package of an extra into a skipped test that names the package."""
    if not (report.failed and node.config.getoption("core")):
        return report
    from stacey_dist.extras import install_line  # it loads torch

    missing = re.findall(r"No module named '(\w+)", str(report.longrepr))
    if missing and (missing[-1] == "triton" or install_line(missing[-1])):
        report.outcome = "skipped"
        report.longrepr = (str(node.path), 0, f"Skipped: {missing[-1]} is not installed")
    return report
