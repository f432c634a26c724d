"""End a program that cannot train. An error that the user can fix is printed in one line, by one process."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stacey_dist.errors import InputError, SettingsError
from stacey_dist.training.processes import heartbeat, signals

# Errors of a disk, a quota or a limit of the process, which are no fault of the program.
_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
)


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """Print a SettingsError as one line and exit with status 2; exit with 130 on Ctrl-C.

    Errors of a disk (it is full, or may not be written or read) and of a GPU's memory are one line too, with status 1.
    If several processes fail for one reason, one of them prints it: by heartbeat, or, before they have joined each
    other, the first of each node. With `train.heartbeat_timeout_seconds` null, each that fails later prints it.
    """
    try:
        with signals.listening():
            yield
    except Exception as error:
        known, first = isinstance(error, (SettingsError, InputError)), heartbeat.report(error)
        # Before they join each other, the processes of a node find the same.
        first &= torch.distributed.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0" or not known
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if first and not (known or out_of_memory or getattr(error, "errno", None) in _DISK_ERRORS):
            raise
        if first:
            advice = "\nlower train.micro_batch_size, or shard over more GPUs: `stacey-dist plan` says what fits"
            print(f"{program}: error: {error}{advice if out_of_memory else ''}", file=sys.stderr, flush=True)
        sys.exit(2 if known else 1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
