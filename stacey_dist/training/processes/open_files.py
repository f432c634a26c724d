"""Raise the limit of open files, which many processes reach because every connection is an open file.

The process that hosts the TCPStore has three connections to each process: torch's, the heartbeat's, and one by which
the process notices that the store has ended. In a gloo group, each process is connected to every other. A connection
above the limit ends in "Connection reset by peer". So the limit is raised first, or reported as too low.
"""

import os
import resource
from contextlib import suppress

from stacey_dist.errors import SettingsError

# What a process has open besides: libraries, devices, data, logs.
_OTHERS = 512
# Groups of gloo: the requests of an update, checkpoints (or the default group, on CPUs), and saving in the background.
_GROUPS = 3


def raise_limits(processes: int, heartbeat: bool) -> None:
    """Raise the soft limit of open files as far as it is needed, of this process and of the launcher with the store.

    Raises SettingsError if a hard limit is too low.
    """
    if processes == 1:
        return
    store = processes * (3 if heartbeat else 1)
    lazy = os.environ.get("TORCH_GLOO_LAZY_INIT") == "1"
    groups = 0 if lazy else _GROUPS * processes
    is_first = os.environ.get("RANK", "0") == "0"
    in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    hint = "" if lazy else "; TORCH_GLOO_LAZY_INIT=1 makes gloo connect only processes that communicate"
    _raise_limit(os.getpid(), groups + (store if is_first and not in_launcher else 0), processes, hint)
    if is_first and in_launcher:
        _raise_limit(os.getppid(), store, processes, "")


def _raise_limit(process: int, needed: int, processes: int, hint: str) -> None:
    with suppress(PermissionError, AttributeError):  # not ours; a system without `prlimit`
        soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
        wanted = needed + _OTHERS
        if hard != resource.RLIM_INFINITY:
            if hard < needed:
                raise SettingsError(
                    f"the limit of open files: {hard} (ulimit -Hn) is not allowed for {processes} processes; it must "
                    f"be at least {wanted}, for their connections{hint}"
                )
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.prlimit(process, resource.RLIMIT_NOFILE, (wanted, hard))
