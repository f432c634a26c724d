"""Signals that ask a run to stop, and the threads of its processes."""

import io
import signal
import sys
from types import SimpleNamespace

import pytest

from stacey_dist.training.processes import devices, signals


def test_only_a_second_ctrl_c_stops_at_once(monkeypatch, request):
    clock = iter([0.0, 0.1, 5.0, 5.1, 9.0])
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with signals.StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher passes the same Ctrl-C on
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # Slurm, then torchrun's agent
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_slow_micro_batch_or_step_is_waited_for(monkeypatch):
    clock = iter([10.0, 100.0, 101.0, 102.0, 103.0])
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(signals, "_state", signals._State())
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)

    def patience():
        return signals._state.patience()

    signals.update_begins()
    assert patience() == 20.0
    signals.progress()  # 90 seconds in a micro-batch
    assert patience() == 180.0
    signals.update_begins()
    signals.progress()
    assert patience() == 180.0
    signals.update_begins()  # not longer than in the next update
    assert patience() == 20.0
    for given, seconds in (("120", 110.0), ("30", 20.0), ("10", 20.0), ("soon", 20.0)):
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", given)
        assert patience() == seconds


def test_a_signal_in_the_middle_of_a_print_is_taken(monkeypatch, capfd):
    # `print` in the handler would raise, for the other one holds the stream, and the run would end without a save.
    class Slow(io.RawIOBase):
        """A terminal that does not read, until the signal is there."""

        def writable(self):
            return True

        def write(self, text):
            if not stop.received:
                signal.raise_signal(signal.SIGTERM)
            return len(text)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Slow())))
    with signals.StopSignal() as stop:
        print("step 1/2", flush=True)
    assert stop.received == signal.SIGTERM
    assert "SIGTERM: finishing this step" in capfd.readouterr().out


def test_signals_that_are_ignored_stay_ignored(request):
    """A shell ignores SIGINT for a background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with signals.StopSignal() as stop:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        assert stop.received is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_omp_num_threads_is_honoured(monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    # what OMP_NUM_THREADS is, threads when started as `python`, and by `accelerate launch` as one of two processes
    for asked, alone, launched in ((None, 8, 4), ("3", 3, 3), ("1", 1, 4), ("16", 16, 4), ("0", 8, 4), ("many", 8, 4)):
        with monkeypatch.context() as patch:
            if asked is not None:
                patch.setenv("OMP_NUM_THREADS", asked)
            assert devices.cpu_threads() == alone
            patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
            patch.setenv("LOCAL_WORLD_SIZE", "2")
            assert devices.cpu_threads() == launched
