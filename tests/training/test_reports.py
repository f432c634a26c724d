"""What a run reports: rows, rates, lines and trackers."""

import errno
import functools
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from stacey_dist.errors import SettingsError
from stacey_dist.training.processes.failures import user_errors
from stacey_dist.training.reports.flops import peak_flops
from stacey_dist.training.reports.metrics import duration
from stacey_dist.training.reports.rows import RowFile, read_rows
from stacey_dist.training.reports.trackers import close_trackers, log, start_trackers
from stacey_dist.training.run import print_line


def test_peak_flops_and_durations():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12
    for other in ("Some Other Chip", "NVIDIA RTX A4000", "NVIDIA L40", "NVIDIA T400 4GB"):
        assert peak_flops(other) is None
    assert [duration(s) for s in (5, 65, 3599.7, 7265)] == ["5s", "1m05s", "1h00m", "2h01m"]


def test_rows_survive_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": 2.0}]


def test_lines_that_hold_no_row_are_named_and_the_others_kept(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    bad = [
        b"garbage",
        b"{}",
        b"[1, 2]",
        b"7",
        b'"step"',
        b"null",
        b"[" * 100_000,
        b'{"step": ' * 5_000,
        b'{"step": "3"}',
        b'{"step": true}',
        b'{"step": 1.5}',
        b'{"step": -1}',
        b'{"step": null}',
        b'{"step": ' + b"9" * 5_000 + b"}",
        b'{"step": 2, "loss": \xff}',
        b"\x00" * 50,
        b'{"step": 3, "lo',
    ]
    good = [b'{"step": 1, "loss": 0.1}', b'{"step": 2, "loss": 1e-07}', b'{"step": 2, "eval_loss": 3.0}']
    later = b'{"step": 3, "loss": 0.5}'
    path.write_bytes(b"\n".join([good[0], *bad[:9], b"", good[1], *bad[9:], good[2], later]) + b"\n")
    written = RowFile(path, functools.partial(print, flush=True))
    written.drop_later(2, 2)
    assert path.read_bytes() == b"".join(line + b"\n" for line in good)
    warning = f"warning: {path}: dropped {len(bad)} of its lines, which hold no row: line 2, 3, 4, ..."
    assert warning in capsys.readouterr().out
    written.drop_later(2, 2)
    assert capsys.readouterr().out == ""
    evaluation = b'{"step": 2, "eval_accuracy": 0.5}\n'  # of a program of one's own
    path.write_bytes(b'{"step": 2, "lr": 0.5}\n' + evaluation)
    written.drop_later(2, 1)
    assert path.read_bytes() == b'{"step": 2, "lr": 0.5}\n'
    path.unlink()
    path.mkdir()
    with pytest.raises(SettingsError, match="is no regular file"):
        written.drop_later(0, 0)


class FailingTracker:
    def __init__(self, name, rows):
        self.name, self.rows = name, rows

    def log(self, row, step=None):
        if self.rows is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.rows.append(row)

    def finish(self):
        raise ConnectionResetError("the service has died")


def test_a_tracker_that_fails_does_not_end_the_run():
    said, rows = [], []
    trackers = [FailingTracker("tensorboard", None), FailingTracker("wandb", rows)]
    run = SimpleNamespace(accelerator=SimpleNamespace(trackers=trackers), say=said.append)
    for step in (1, 2):
        log(run, {"step": step, "loss": 0.5})
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    close_trackers(run)
    assert said[0].startswith("tensorboard failed and gets no more rows, training continues: ")
    assert said[1:] == ["wandb could not finish: ConnectionResetError: the service has died"]
    assert "No space left on device" in said[0]
    assert trackers == []


def test_a_second_call_of_train_goes_on_with_the_trackers():
    accelerator = SimpleNamespace(
        trackers=["one that was started"], init_trackers=lambda *_, **__: pytest.fail("again")
    )
    tracking = SimpleNamespace(trackers=["tensorboard"])
    start_trackers(SimpleNamespace(accelerator=accelerator, config=SimpleNamespace(tracking=tracking)), 3)


def test_a_log_on_a_full_disk_does_not_end_the_run(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print_line("a checkpoint failed, training continues")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what it still holds


def test_a_full_disk_and_a_full_gpu_are_told_in_a_line(capsys):
    with pytest.raises(SystemExit) as ended, user_errors("train_llm.py"):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/metrics.jsonl")
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"train_llm.py: error: [Errno {errno.ENOSPC}] No space left on device: 'runs/metrics.jsonl'"
    )
    with pytest.raises(SystemExit) as ended, user_errors("train_llm.py"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "train_llm.py: error: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "lower train.micro_batch_size, or shard over more GPUs: `stacey-dist plan` says what fits",
    ]
    with pytest.raises(FileNotFoundError), user_errors("train_llm.py"):  # a defect, perhaps: where was it?
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")
