"""Rendezvous as with torch's env://, but separately for each attempt of a launch.

Accelerate's launcher keeps one store over `--max_restarts`, and torch puts every attempt's keys into the same place
(it expects a new store for each). A restarted process would find the addresses of dead processes, and use them as its
peers'. If the launcher keeps no store (`--rdzv_backend c10d`, as docs/how-to/clusters.md has it), each
attempt has a new one, and the launchers of several nodes need not have counted the same number of restarts.
"""

import os
from collections.abc import Iterator
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

ATTEMPT = "attempt://"


def attempt() -> str:
    """Return the number of restarts with the same store, as text."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return "0"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _meet(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    for store, rank, processes in rendezvous(f"env:{url.partition(':')[2]}", **options):
        yield PrefixStore(f"stacey_dist/attempt_{attempt()}", store), rank, processes


register_rendezvous_handler(ATTEMPT.partition(":")[0], _meet)
