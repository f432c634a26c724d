"""SIGTERM and Ctrl-C: finish the update, save, and leave so that a scheduler can start the run again.

A main thread that waits (for data, a collective, a lock, a compiler) does not reach the end of its update. If it waits
in C code, it does not run Python's signal handlers either. So a thread also receives every signal, through
`signal.set_wakeup_fd`. It ends the process if the main thread makes no progress in time.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A SIGINT within this time is the same Ctrl-C, forwarded by a launcher. A person who presses Ctrl-C again is slower.
_SAME_CTRL_C_SECONDS = 1.0
# Slurm sends SIGTERM to every process, and torchrun's agent passes its own on.
_SAME_SIGTERM_SECONDS = 5.0
# Schedulers and torchrun kill 30 seconds after SIGTERM, unless they are told otherwise.
_PATIENCE_SECONDS = 20.0
_TORCHRUNS_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_UNWINDING_SECONDS = 5.0
# A process that has written its part of a checkpoint waits for the slowest disk of all.
_PATIENCE_WITH_OTHERS_SECONDS = 300.0
_WRITTEN_BYTES = 4096


def say(line: str, descriptor: int = 2) -> None:
    """Print a line, by default on standard error, from any thread and in a signal's handler.

    `print` raises an error where it is called in the middle of another one, and waits for a thread that holds the
    stream. What cannot be written, as to a pipe that is closed, is no error: the process that says it has to end.
    """
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{line}\n".encode())


def heeded_signals() -> list[int]:
    """Return the signals that stop a run: not those that are ignored, as SIGINT by a shell's background job."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


class StopSignal:
    """While entered, remembers the first SIGTERM or SIGINT in `received`. Outside the main thread it receives none.

    SIGTERM may come again while the checkpoint is written: Slurm sends it to every process, and torchrun's agent
    passes its own on. So only a second Ctrl-C, from a person, stops at once; a second SIGTERM that comes 5 seconds
    after the first does so where no checkpoint is being written.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self._before = {number: signal.signal(number, self._handle) for number in heeded_signals()}
        _state.stop = self
        _state.progress_at = _state.slowest = _state.slowest_before = 0.0
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _state.stop = None
        if self.received is not None and kind is not None and _state.listening:
            signal.alarm(int(_PATIENCE_SECONDS))  # kills the process if the interpreter does not end
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = number, now
            line = f"\n{signal.Signals(number).name}: finishing this step, then saving (Ctrl-C again: stop at once)"
            if os.environ.get("RANK", "0") == "0":  # a launcher passes the signal on to all
                say(line, 1)
        elif number == signal.SIGINT and now - self._received_at > _SAME_CTRL_C_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)


class _State:
    """The listening thread's knowledge of the main thread."""

    def __init__(self) -> None:
        self.listening = False
        self.stop: StopSignal | None = None
        """The one that is entered, if there is one: signals take effect at the end of an update."""
        self.writing = False
        """The main thread waits for a checkpoint."""
        self.progress_at = 0.0
        self.slowest = self.slowest_before = 0.0
        """The most seconds without progress, since this update and the one before began."""

    def patience(self) -> float:
        """Return after how many seconds without progress the main thread counts as stuck.

        On a CPU a micro-batch can take minutes, as can an optimizer's step with its states in host memory.
        """
        given = 0.0
        if torch.__version__ >= "2.12":  # older launchers do not read it
            with contextlib.suppress(KeyError, ValueError):
                given = float(os.environ[_TORCHRUNS_PATIENCE]) - 10.0
        return max(_PATIENCE_SECONDS, given, 2.0 * self.slowest, 2.0 * self.slowest_before)


_state = _State()


def stop_requested() -> bool:
    """Return whether this process was told to stop, while a `StopSignal` is entered."""
    return _state.stop is not None and _state.stop.received is not None


def update_begins() -> None:
    """Note that the main thread begins an update."""
    progress()
    _state.slowest_before, _state.slowest = _state.slowest, 0.0


def progress() -> None:
    """Note that the main thread makes progress: a micro-batch is done, or a batch of an evaluation."""
    now = time.monotonic()
    if _state.progress_at:
        _state.slowest = max(_state.slowest, now - _state.progress_at)
    _state.progress_at = now


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Tell the listening thread that the main thread waits for a checkpoint, which no signal may cut short."""
    _state.writing = True
    try:
        yield
    finally:
        _state.writing = False
        _state.progress_at = time.monotonic()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Have SIGTERM and Ctrl-C end this process and its children in time, whatever the main thread waits for.

    Outside `StopSignal` they raise SystemExit (with 128 + the signal's number) and KeyboardInterrupt. A process that
    does not end by itself is ended, with one line that says where its main thread was.
    """
    if threading.current_thread() is not threading.main_thread() or _state.listening:
        yield
        return
    before = {number: signal.getsignal(number) for number in heeded_signals()}
    listener = _Listener()
    for number in before:
        signal.signal(number, listener.interrupt)
    _state.listening = True
    try:
        yield
    finally:
        _state.listening = False
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()


class _Listener:
    """The thread that receives every signal, and ends the process in time."""

    def __init__(self) -> None:
        self._children: list[psutil.Process] = []
        self._main = threading.main_thread().ident
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._received_at: float | None = None
        self._second_ctrl_c = False
        self._thread = threading.Thread(target=self._listen, name="listens for signals", daemon=True)
        self._thread.start()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the main thread. Its children are listed first: once it has ended, they are no longer its own."""
        self._children = self._children or _children()
        signal.alarm(2 * int(_UNWINDING_SECONDS))  # kills the process if the interpreter does not end
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        say(f"{signal.Signals(number).name}: stopped")
        sys.exit(128 + number)

    def close(self) -> None:
        """End the thread and, after a signal, the children."""
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)
        _end_all(self._children)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1)[0]:
            if number not in SIGNALS:
                continue
            if self._received_at is None:
                self._received_at = time.monotonic()
                threading.Thread(target=self._watch, args=(number,), name="watches the end", daemon=True).start()
                continue
            ago = time.monotonic() - self._received_at
            if number == signal.SIGINT and ago > _SAME_CTRL_C_SECONDS:
                self._second_ctrl_c = True  # the handler raises, if it comes to run
            elif number == signal.SIGTERM and ago > _SAME_SIGTERM_SECONDS and not _state.writing:
                self._end(number)

    def _watch(self, number: int) -> None:
        """End the process where the main thread makes no progress after a signal."""
        _state.progress_at = time.monotonic()
        written = _bytes_written()
        if _state.stop is None:
            self._children = self._children or _children()
        while _state.listening:
            time.sleep(0.2)
            now = time.monotonic()
            if _state.writing and (written + _WRITTEN_BYTES <= _bytes_written() or _waits_for_a_disk()):
                written = _bytes_written()
                _state.progress_at = now
            if self._second_ctrl_c or _state.stop is None:
                patience = _UNWINDING_SECONDS
            elif _state.writing and _waits_for_others():
                patience = _PATIENCE_WITH_OTHERS_SECONDS
            else:
                patience = _state.patience()
            if now - _state.progress_at > patience:
                self._end(number)

    def _end(self, number: int) -> NoReturn:
        """End this process and its children at once, with a line that says where the main thread was."""
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        place = _place(sys._current_frames().get(self._main or 0))
        saved = "without a save; the same command resumes from the newest checkpoint" if _state.stop else "at once"
        say(f"{rank}{signal.Signals(number).name}: stopped {place} {saved}")
        _end_all([*self._children, *_children()])
        os._exit(128 + number)


def _place(frame: FrameType | None) -> str:
    """Return where a thread is: its innermost function, and which of this package called it."""
    if frame is None:
        return "at the end of the program"
    place = "in " + _name(frame)
    caller: FrameType | None = frame
    while caller is not None and "stacey_dist" not in caller.f_code.co_filename:
        caller = caller.f_back
    return place if caller in (None, frame) else f"{place}, called by {_name(caller)}"


def _name(frame: FrameType) -> str:
    parts = Path(frame.f_code.co_filename).parts
    return f"{frame.f_code.co_name} ({'/'.join(parts[-3:])}:{frame.f_lineno})"


def _children() -> list[psutil.Process]:
    """Return the processes under this one, but for those that end by themselves and clean up after it."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if not any("resource_tracker" in word or "torch_shm_manager" in word for word in child.cmdline()):
                    found.append(child)
    return found


def _end_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _bytes_written() -> int:
    """Return how many bytes this process has written to files; 0 where the system does not say."""
    with contextlib.suppress(OSError, IndexError, ValueError):  # not psutil, which needs all entries of this file
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])
    return 0


def _waits_for_a_disk() -> bool:
    """Return whether a thread of this process is in the kernel, at a disk or its network."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] == "D":
                return True
    return False


def _waits_for_others() -> bool:
    """Return whether the thread that writes a checkpoint is in a collective."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0) if thread.name.startswith("writes ") else None
        if frame is not None and "distributed" in Path(frame.f_code.co_filename).parts:
            return True
    return False
