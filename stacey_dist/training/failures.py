"""How a program ends that cannot train: in a line where the user can mend it, and once for all processes."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stacey_dist.errors import InputError, SettingsError
from stacey_dist.training import heartbeat, signals

# What a disk, a quota or a limit of the process refuses: no fault of the program.
_OF_A_DISK = (
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

    So are errors of a disk (it is full, or may not be written or read) and of a GPU's memory. Of several processes that
    fail for one reason, one says it.
    """
    try:
        with signals.listening():
            yield
    except Exception as error:
        known, mine = isinstance(error, (SettingsError, InputError)), heartbeat.report(error)
        of_memory = isinstance(error, torch.OutOfMemoryError)
        if mine and not (known or of_memory or getattr(error, "errno", None) in _OF_A_DISK):
            raise
        if mine:
            advice = "\nlower train.micro_batch_size, or shard over more GPUs: `stacey-dist plan` says what fits"
            print(f"{program}: error: {error}{advice if of_memory else ''}", file=sys.stderr, flush=True)
        sys.exit(2 if known else 1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
