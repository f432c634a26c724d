"""The parts of an update that need no launch: clipping, what came of it, and the number of micro-batches."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stacey_dist.training import loop, start
from stacey_dist.training.batch_norms import BatchNorms
from stacey_dist.training.callbacks import Clock
from stacey_dist.training.deepspeed_engine import DeepSpeedEngine
from stacey_dist.training.engine import Engine
from stacey_dist.training.processes import signals
from stacey_dist.training.progress import Progress
from stacey_dist.training.settings.config import RunConfig


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_replicas_are_clipped_by_the_norm_of_the_first_process(monkeypatch, limit):
    """On unlike processors their own differ in the last bits, and the weights would drift apart."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model.weight.grad = torch.full((1, 1), 4.0)
    engine = object.__new__(Engine)
    engine._batch_norms = BatchNorms(model)
    engine.run = SimpleNamespace(config=RunConfig())
    engine.run.config.train.max_grad_norm = limit
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine.model = model
    engine.optimizer = SimpleNamespace(optimizer=optimizer, zero_grad=lambda: None)
    engine.accelerator = SimpleNamespace(
        num_processes=2, is_main_process=False, scaler=None, unscale_gradients=lambda: None
    )
    monkeypatch.setattr("stacey_dist.training.engine.base_optimizer", lambda wrapped: optimizer)
    first = torch.tensor([0.5, 8.0])  # the loss and the norm of the first process
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda shared: shared.add_(first))
    outcome = engine.finish_update(torch.tensor(0.5))
    assert outcome.tolist() == [1.0, 8.0, 0.0]
    assert float(model.weight) == pytest.approx(-4.0 / 8.0 if limit else -4.0)


@pytest.mark.parametrize(
    ("norm", "overflow", "expected"), [(2.0, False, 0.0), (-1.0, False, 1.0), (float("inf"), True, 1.0)]
)
def test_what_deepspeed_applies_though_it_is_not_finite_counts_as_skipped(norm, overflow, expected):
    """So the run ends at train.max_skipped_steps. DeepSpeed gives -1 for a norm that is not finite."""
    engine = object.__new__(DeepSpeedEngine)
    engine._batch_norms = BatchNorms(torch.nn.Linear(1, 1))
    engine.accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    zero = SimpleNamespace(overflow=overflow)
    engine.model = SimpleNamespace(step=lambda: None, get_global_grad_norm=lambda: norm, optimizer=zero)
    assert float(engine.finish_update(torch.tensor(0.5))[2]) == expected
    assert float(engine.finish_update(torch.tensor(torch.nan))[2]) == 1.0


@pytest.mark.parametrize(("given", "message"), [(1, "yielded 1 micro"), (3, "yielded at least 3 micro"), (2, None)])
def test_a_task_must_have_as_many_micro_batches_as_the_update(given, message):
    """With fewer, DDP's replicas would not add their gradients."""

    class Whole:
        def micro_batches(self, position):
            return iter(range(given))

    trainer = object.__new__(loop._Trainer)
    trainer.task, trainer.progress, trainer.clock = Whole(), Progress(), Clock()
    if message is None:
        assert list(trainer._micro_batches(2)) == [0, 1]
        return
    with pytest.raises(ValueError, match=rf"Whole.micro_batches {message}-batches; expected 2 = "):
        list(trainer._micro_batches(2))


def test_the_others_wait_without_a_limit_for_what_is_told_of_a_checkpoint():
    told, called = [], []
    trainer = object.__new__(loop._Trainer)
    trainer.saver = SimpleNamespace(take_complete=lambda: [Path("step_1"), Path("step_2")])
    trainer.callbacks = [SimpleNamespace(on_checkpoint_saved=lambda training, path: told.append(path.name))]
    trainer.run = SimpleNamespace(call_on_main=called.append)
    trainer._report_saved_checkpoints()
    assert told == []
    called[0]()
    assert told == ["step_1", "step_2"]


def test_an_earlier_update_than_that_of_the_source_gives_the_source(monkeypatch, tmp_path):
    config = RunConfig()
    config.checkpoint.resume_from = str(tmp_path / "step_00000010")
    monkeypatch.setattr(loop, "restore", lambda *_: Progress(step=10))
    trainer = SimpleNamespace(stop_step=5, last_step=20, evaluation_is_missing=lambda: False)
    monkeypatch.setattr(loop, "_Trainer", lambda *_: trainer)
    run = SimpleNamespace(config=config, directory=tmp_path / "run", say=lambda message: None)
    assert loop.train(run, None, None, until=5) == tmp_path / "step_00000010"


def test_off_the_main_thread_signals_are_not_heard():
    found = []

    def train():
        with signals.StopSignal() as stop:
            found.append(stop.received)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [None]


def test_the_threads_of_a_process_are_set_on_a_gpu_too(monkeypatch):
    """torchrun sets OMP_NUM_THREADS=1, and an offloaded update is made on the CPU."""

    class ThreadsError(Exception):
        pass

    def set_num_threads(count):
        raise ThreadsError(count)

    monkeypatch.setattr(start, "start_accelerator", lambda config: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    config = RunConfig()
    config.train.cpu_threads = 7
    with pytest.raises(ThreadsError, match="7"):
        start.start(config)
