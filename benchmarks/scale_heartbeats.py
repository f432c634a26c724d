"""The table of scale.py about heartbeats: the code of thousands of processes, in a few processes of one machine."""

import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measure import show
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stacey_dist.training.processes import heartbeat

_IN_ONE = 512  # heartbeats in a process: each has two connections
_ROUNDS = 5


class _NoThread:
    """In place of a thread: rounds are made when the benchmark asks for them."""

    def __init__(self, **_: Any) -> None:
        pass

    def start(self) -> None:
        pass


def _beat(connection: Connection, ranks: range, count: int) -> None:
    """Make the heartbeats of `ranks`, then a round of each whenever told to; answer with the seconds of processor."""
    ours: Any = SimpleNamespace(Thread=_NoThread, Event=threading.Event, Lock=threading.Lock)
    heartbeat.threading = ours  # type: ignore[attr-defined]
    address = "127.0.0.1", connection.recv()
    with ThreadPoolExecutor(_IN_ONE) as pool:  # where names are not resolved, a connection waits for seconds
        beats = list(pool.map(lambda rank: heartbeat.Heartbeat(rank, count, 30.0, address), ranks))
    connection.send(0.0)
    while connection.recv():
        begin = time.process_time()
        for beat in beats:
            beat._round(1.0)
        connection.send(time.process_time() - begin)
    os._exit(0)


def _answer(connection: Connection) -> float:
    if not connection.poll(200):
        raise TimeoutError("a process of the benchmark does not answer")
    return float(connection.recv())


def _round(connections: list[Connection]) -> list[float]:
    """Have each process make a round; return their seconds."""
    for connection in connections:
        connection.send(True)
    return [_answer(connection) for connection in connections]


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def heartbeats(counts: tuple[int, ...] = (1024, 2048, 4096)) -> None:
    """What one round of heartbeats, which is made each second, costs the store and the processes."""
    context, limit = get_context("fork"), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    rows = []
    for count in counts:
        if limit != resource.RLIM_INFINITY and limit < 2 * count + 64:
            print(f"\nHeartbeats of {count} processes: left out, for the limit of open files is {limit}")
            continue
        bounds = [0, 1, *range(_IN_ONE, count, _IN_ONE), count]
        pipes = [context.Pipe() for _ in bounds[1:]]
        processes = [
            context.Process(target=_beat, args=(pipe[1], range(first, last), count))
            for pipe, first, last in zip(pipes, bounds, bounds[1:], strict=False)
        ]
        for process in processes:
            process.start()
        before, begun = _open_files(), time.perf_counter()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ours = [pipe[0] for pipe in pipes]
        ours[0].send(store.port)  # process 0, which the others ask for its host
        _answer(ours[0])
        for each in ours[1:]:
            each.send(store.port)
        for each in ours[1:]:
            _answer(each)
        joined, opened = time.perf_counter() - begun, _open_files() - before
        _round(ours)  # the first one reads each counter once more
        begin = time.process_time()
        rounds = [_round(ours) for _ in range(_ROUNDS)]
        served, seconds = time.process_time() - begin, [sum(each) for each in zip(*rounds, strict=True)]
        for each in ours:
            each.send(False)
        for process in processes:
            process.join()
        first, others = 1000 * seconds[0] / _ROUNDS, 1000 * sum(seconds[1:]) / _ROUNDS / (count - 1)
        rows.append((count, opened, joined, 1000 * served / _ROUNDS, first, others))
        del store
    head = ("processes", "connections of the store", "s to join", "ms a round: the store", "process 0", "another")
    show(f"Heartbeats, a round a second (limit of open files: {limit})", head, *rows)
