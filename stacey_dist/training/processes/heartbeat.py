"""Heartbeats: every process sends them; if one falls silent, the others name it and stop.

A process that dies or hangs leaves the others in a collective that never ends, or that ends in an error about some
connection, on all of them. So a thread of each process counts up in the TCPStore that the processes met at. Process 0
watches all counters, the others watch process 0's. Whoever finds one silent, or fails, leaves a verdict in the store;
all read it there, so that one line says what happened, and stop with status 75 (EX_TEMPFAIL). The launcher's
`--max_restarts`, or the scheduler, starts the run again.

torch names no such process within seconds on both gloo and NCCL: `monitored_barrier` is gloo's alone, and a barrier;
the elastic agent sees processes of its own node exit, and not hang; its health check answers for the agent; NCCL's
watchdog and flight recorder act after minutes, when a collective has timed out, and leave dumps to be read.

Only these threads are judged, never the progress of training: a process that prepares data for hours still sends
heartbeats.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import threading
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from stacey_dist.errors import one_line
from stacey_dist.training.processes import rendezvous
from stacey_dist.training.processes.signals import say

EXIT_STATUS = 75
_AGAIN = "all processes stop; started again, the run resumes from its newest checkpoint"
# A process says goodbye by adding this to its counter. A separate text value would not do: `_read` creates missing keys
# with `add(key, 0)`, which needs a number.
_GOODBYE = 10**15
# Matches the messages of errors that another process may have caused: those of gloo, NCCL and the store.
_CAUSED_BY_ANOTHER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE
)


class Heartbeat:
    """This process's beats, and its watch over the others.

    Args:
        rank: this process.
        processes: how many there are.
        timeout: seconds of silence after which a process is taken for dead.
        address: the host and port of the store that all processes reach.
    """

    def __init__(self, rank: int, processes: int, timeout: float, address: tuple[str, int]) -> None:
        self.rank, self.processes, self.timeout = rank, processes, timeout
        self.interval = min(1.0, timeout / 10)
        self.host = socket.gethostname()
        # A connection of its own: an operation that waits would hold up all others.
        store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.store = PrefixStore(f"stacey_dist/heartbeat_{rendezvous.attempt()}", store)
        # Nothing is sent over this connection. When it closes, the store is gone. Asking through the store's own client
        # would print a C++ stack trace, which still happens once if the store dies while it answers.
        self._line = socket.create_connection(address, timeout=60)
        self._watched = list(range(processes)) if rank == 0 else [0]
        self._counters: dict[int, int] = {}
        self._silent: dict[int, float] = {}
        self._store_silent = 0.0
        self._store_gone = False
        self._pending_error: str | None = None
        self._short_patience = False
        self._no_other_fell_silent = threading.Event()
        self._stopping = threading.Event()
        self._leaving = threading.Lock()
        self.store.set(f"host/{rank}", self.host)
        self._host_of_store = self.store.get("host/0").decode()
        self._beats = threading.Thread(target=self._beat_and_watch, name="heartbeat", daemon=True)
        self._beats.start()
        threading.Thread(target=self._watch_the_store, name="heartbeat: store", daemon=True).start()

    def stop(self) -> None:
        """Say goodbye: from now on no process takes this one for dead."""
        self._stopping.set()
        self._beats.join(timeout=5)
        if not self._beats.is_alive() and not self._gone():
            with contextlib.suppress(dist.DistError):
                self.store.add(f"beat/{self.rank}", _GOODBYE)
                # The store may live in process 0: it leaves last, if the others do not take long.
                for _ in range(50 if self.rank == 0 else 0):
                    if self._gone() or all(counter >= _GOODBYE for counter in self._read()):
                        break
                    time.sleep(0.1)
        self._line.close()

    def report(self, error: Exception) -> bool:
        """Return whether to raise the error that ends this process: true if no other process failed first.

        Does not return if another process caused the error.
        """
        line = f"rank {self.rank} on {self.host} failed: {one_line(error)}"
        if caused_by_another_process(error):
            # When a process dies, the launcher stops the others. This process ignores that until the dead one is named.
            handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._pending_error = line
            self._no_other_fell_silent.wait()
            signal.signal(signal.SIGTERM, handler)
            return True
        self._stopping.set()
        with contextlib.suppress(dist.DistError):
            if not self._gone():
                first, found = self._store_verdict(line)
                if not first and one_line(error) not in found:
                    say(line)
                return first
        return True

    def _beat_and_watch(self) -> None:
        before, in_doubt = time.monotonic(), 0.0
        while not self._stopping.wait(self.interval) and not self._gone():
            before, elapsed = time.monotonic(), time.monotonic() - before
            # Where this process itself was paused, the others have not been silent for so long.
            elapsed = min(elapsed, 2 * self.interval)
            try:
                self._round(elapsed)
                in_doubt += elapsed if self._pending_error else 0.0
                if self._pending_error and in_doubt > 10 * self.interval:
                    if not self._store_verdict(self._pending_error)[0]:
                        self._stop_for_verdict()
                    self._stopping.set()
                    self._no_other_fell_silent.set()
            except dist.DistError:
                self._store_gone = True
            self._store_silent = 0.0

    def _round(self, elapsed: float) -> None:
        """Send a heartbeat, then check for a verdict and for silent processes."""
        self.store.add(f"beat/{self.rank}", 1)
        if self.store.check(["verdict"]):
            self._stop_for_verdict()
        if self._pending_error and not self._short_patience:
            # Process 0 reads it, because it watches all others. If each process did, the store would get N^2 requests.
            self.store.set("doubt", "")
        hurry = bool(self._pending_error) or (self.rank == 0 and self.store.check(["doubt"]))
        # With the shorter patience, a process that is only slow would be blamed at once: measure silence from now on.
        if hurry and not self._short_patience:
            self._silent.clear()
        self._short_patience = hurry
        for other, counter in zip(self._watched, self._read(), strict=True):
            alive = counter >= _GOODBYE or counter != self._counters.get(other) or other == self.rank
            self._silent[other] = 0.0 if alive else self._silent.get(other, 0.0) + elapsed
            self._counters[other] = counter
        longest = max(self._silent.values())
        if longest >= self._patience:
            # Those of one host fall silent at once, and not all between the same two beats.
            dead = [other for other, silent in self._silent.items() if silent > longest - 2 * self.interval]
            line = f"{self._names(dead)} stopped answering {longest:.0f} s ago; {_AGAIN}"
            if self._store_verdict(line)[0]:
                self._leave(line)
            self._stop_for_verdict()

    def _watch_the_store(self) -> None:
        before = time.monotonic()
        while not self._stopping.wait(self.interval):
            before, elapsed = time.monotonic(), time.monotonic() - before
            self._store_silent += min(elapsed, 2 * self.interval)
            patience = 3 * self.interval if self._gone() else self._patience + 2 * self.interval
            if self._store_silent > patience and self._counters.get(0, 0) >= _GOODBYE:
                self._no_other_fell_silent.set()
            elif self._store_silent > patience:
                name = f"rank 0 on {self._host_of_store}, or the launcher beside it,"
                line = f"{name} stopped answering {self._store_silent:.0f} s ago; {_AGAIN}"
                # Where process 0 has died, the next one speaks for its host.
                speaker = "1" if self.host == self._host_of_store else "0"
                self._leave(line if os.environ.get("LOCAL_RANK", speaker) == speaker else None)

    @property
    def _patience(self) -> float:
        """Seconds of silence to tolerate: fewer after a process has lost a connection."""
        return min(self.timeout, 4 * self.interval) if self._short_patience else self.timeout

    def _gone(self) -> bool:
        if not self._store_gone and self._line.fileno() >= 0:
            poll = select.poll()  # not select, which takes no descriptor from 1024 on
            poll.register(self._line, select.POLLIN)
            self._store_gone = bool(poll.poll(0))
        return self._store_gone

    def _read(self) -> list[int]:
        """Return the counters of the processes that are watched."""
        keys = [f"beat/{other}" for other in self._watched]
        for key in keys if len(self._counters) < len(keys) else []:
            self.store.add(key, 0)  # reading a key that is not there would wait for it
        return [int(counter) for counter in self.store.multi_get(keys)]

    def _names(self, ranks: list[int]) -> str:
        """Return ranks as text: "rank 3 on a, ranks 8, 9 on b"."""
        by_host: dict[str, list[str]] = {}
        for other in ranks:
            known = self.store.check([f"host/{other}"])
            host = self.store.get(f"host/{other}").decode() if known else "an unknown host"
            by_host.setdefault(host, []).append(str(other))
        return ", ".join(f"rank{'s'[: len(r) > 1]} {', '.join(r)} on {host}" for host, r in by_host.items())

    def _store_verdict(self, line: str) -> tuple[bool, str]:
        """Store a verdict, unless there is one already. Return whether it was stored, and the line of the verdict."""
        mine = json.dumps({"line": line, "by": self.rank, "host": self.host})
        verdict = self.store.compare_set("verdict", "", mine).decode()
        return verdict == mine, json.loads(verdict)["line"]

    def _stop_for_verdict(self) -> NoReturn:
        """Stop because of another process's verdict. Print it once on each other host."""
        verdict = json.loads(self.store.get("verdict"))
        elsewhere = verdict["host"] != self.host and os.environ.get("LOCAL_RANK", "0") == "0"
        self._leave(verdict["line"] if elsewhere else None)

    def _leave(self, line: str | None) -> NoReturn:
        """End this process at once, whatever its other threads wait for."""
        with self._leaving:  # once; a second thread waits here for the end
            if line is not None:
                say(line)
            os._exit(EXIT_STATUS)


_running: Heartbeat | None = None


def start(timeout: float | None) -> None:
    """Start the heartbeat, if there are several processes, which have joined each other. None turns it off."""
    global _running
    if timeout is not None and dist.is_initialized() and dist.get_world_size() > 1:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        _running = Heartbeat(dist.get_rank(), dist.get_world_size(), timeout, address)


def stop() -> None:
    """Say goodbye to the other processes."""
    global _running
    if _running is not None:
        _running.stop()
        _running = None


def report(error: Exception) -> bool:
    """Return whether to raise the error that ends this process; see `Heartbeat.report`."""
    return _running is None or _running.report(error)


def caused_by_another_process(error: Exception) -> bool:
    """Return whether another process may be the cause of this error."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(_CAUSED_BY_ANOTHER.search(str(error)))
    )
