"""The loop's parts by themselves: samples, schedule, groups, metrics, signals."""

import errno
import functools
import io
import math
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from stacey_dist.data.mixture import MixedSampler
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.errors import SettingsError
from stacey_dist.training import engine as engine_module
from stacey_dist.training.ahead import Ahead, Transfer
from stacey_dist.training.batch_norms import BatchNorms
from stacey_dist.training.continuing import checkpoint_before_decay
from stacey_dist.training.deepspeed_engine import DeepSpeedEngine
from stacey_dist.training.engine import Engine
from stacey_dist.training.optimizers import corrected_betas, depends_on_skipped, lr_share, parameter_groups, scheduled
from stacey_dist.training.processes import devices, signals
from stacey_dist.training.processes.failures import user_errors
from stacey_dist.training.processes.requests import Agreement, Requests
from stacey_dist.training.progress import Outcomes, Progress
from stacey_dist.training.reports.flops import peak_flops
from stacey_dist.training.reports.metrics import duration
from stacey_dist.training.reports.rows import RowFile, read_rows
from stacey_dist.training.reports.trackers import close_trackers, log, start_trackers
from stacey_dist.training.run import print_line
from stacey_dist.training.saving import Saver, checkpoint_path
from stacey_dist.training.settings.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from stacey_dist.training.settings.llm_config import LLMConfig
from stacey_dist.training.start import separate_runs_of_a_sweep
from stacey_dist.training.tasks.llm import LanguageModeling
from tests.sharding.processes import spawn


class FakeStream:
    """37 windows of 4 labels, the last of 1."""

    total_labels = 36 * 4 + 1

    def __len__(self):
        return 37

    def label_count(self, i):
        return 1 if i == 36 else 4

    def window(self, i):
        labels = np.full(4, i)
        labels[self.label_count(i) :] = -100
        return np.full(4, i), labels


def corpus():
    return SimpleNamespace(name="", share=1, train=FakeStream(), validation=FakeStream())


def make_task(processes, index, micro=2, batch=8):
    config = LLMConfig()
    config.train.global_batch_size = batch
    config.data.sequence_length = 4
    run = SimpleNamespace(
        config=config,
        process_batch_size=batch // processes,
        micro_batch_size=micro,
        accelerator=SimpleNamespace(process_index=index, num_processes=processes, device=torch.device("cpu")),
    )
    task = LanguageModeling.__new__(LanguageModeling)
    task.run, task.batch_size, task.data = run, batch, SimpleNamespace(corpora=[corpus()], verification=None)
    task.sampler, task._transfer = MixedSampler([37], [1], seed=3), Transfer(torch.device("cpu"))
    task._ahead = Ahead(task._share, batch)
    task._router_weight = None
    task._attention = SimpleNamespace(numbers=lambda inputs: (), arguments=lambda numbers: {})
    return task


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_epoch_is_a_permutation_for_any_number_of_processes(processes):
    seen = []
    for position in range(0, 3 * 37, 8):
        share = [
            int(row[0])
            for index in range(processes)
            for batch in make_task(processes, index).micro_batches(position)
            for row in batch.inputs
        ]
        assert share == GlobalSampler(37, seed=3).samples(position, 8).tolist()
        seen += share
    for epoch in range(3):
        assert sorted(seen[epoch * 37 : (epoch + 1) * 37]) == list(range(37))
    assert seen[:37] != seen[37:74]


def test_losses_of_an_update_are_divided_by_all_its_labels():
    task, samples = make_task(2, 1), GlobalSampler(37, seed=3).samples
    position = next(8 * s for s in range(20) if 36 in samples(8 * s, 8))  # the update with the partial window
    assert task.units(position) == 7 * 4 + 1
    assert all(batch.update_labels == 29 for batch in task.micro_batches(position))
    for other in range(0, 400, 8):  # an update of 2 epochs, and of 11, in which it comes as often
        assert task.units(other) == sum(FakeStream().label_count(i) for i in samples(other, 8))
    long = make_task(1, 0, batch=400)
    assert long.units(400) == sum(FakeStream().label_count(i) for i in samples(400, 400))
    counted = sum(int((b.labels != -100).sum()) for i in range(2) for b in make_task(2, i).micro_batches(position))
    assert counted == 29

    def uniform(input_ids):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 37))

    tasks = [make_task(2, i) for i in range(2)]
    total = sum(float(task.loss(uniform, b)) for task in tasks for b in task.micro_batches(position))
    assert total == pytest.approx(math.log(37), rel=1e-6)  # float32 sums of 29 terms
    tasks[0]._router_weight = 0.1
    with pytest.raises(SettingsError, match=r"output_router_logits: true is not allowed; .* gives no balancing loss"):
        tasks[0].loss(uniform, next(tasks[0].micro_batches(position)))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_evaluation_may_be_limited_to_the_first_sequences(monkeypatch, processes):
    """On any number of processes to the same ones; a window's loss is its number."""

    def model(input_ids):
        one_hot = torch.nn.functional.one_hot(input_ids + 1, 38)[..., :37]  # log-probabilities to tell windows by
        return SimpleNamespace(logits=one_hot * input_ids[..., None].float())

    def looked_at(limit):
        total, shares = torch.zeros(1, dtype=torch.float64), []
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: shares.append(values.clone()))
        for index in range(processes):
            task = make_task(processes, index)
            task.run.config.train.eval_sequences = limit
            figures = task.evaluate(model, lambda: False)
        if processes == 1:
            return figures["eval_loss"]
        for share in shares:
            total += share
        return float(total) / sum(FakeStream().label_count(i) for i in range(min(limit or 37, 37)))

    for limit in (None, 5, 37, 100):
        expected = [
            torch.nn.functional.cross_entropy(model(torch.tensor([i])).logits, torch.tensor([i])).item()
            for i in range(min(limit or 37, 37))
            for _ in range(FakeStream().label_count(i))
        ]
        assert looked_at(limit) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_learning_rate_over_the_run():
    shape = dict(warmup_steps=10, min_lr_ratio=0.1)
    cosine, linear, constant = (ScheduleConfig(name, **shape) for name in ("cosine", "linear", "constant"))
    assert [lr_share(s, cosine, 110) for s in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert lr_share(60, cosine, 110) == pytest.approx(0.55)
    assert lr_share(60, linear, 110) == pytest.approx(0.55)
    assert lr_share(35, cosine, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_share(35, linear, 110) == pytest.approx(0.775)
    assert lr_share(60, constant, 110) == 1.0
    for schedule in (cosine, linear):
        assert lr_share(110, schedule, 110) == pytest.approx(0.1)
        assert lr_share(500, schedule, 110) == pytest.approx(0.1)
    assert lr_share(0, ScheduleConfig("cosine", warmup_steps=0, min_lr_ratio=0.0), 1) == 1.0


def test_as_in_the_paper_the_learning_rate_alone_is_scheduled():
    for name in ("stacey", "lp_descent", "adamw"):
        config = RunConfig(optimizer=OptimizerConfig(name=name, lr=2.0))
        assert scheduled(config, 9) == {"lr": pytest.approx(1.0)}


def test_what_else_can_be_scheduled():
    optimizer = OptimizerConfig(lr=0.1, alpha=2.0, tau=0.04, p=2.0, betas=(0.9, 0.99), bias_correction=True)
    schedule = ScheduleConfig("linear", warmup_steps=0, min_lr_ratio=0.5, alpha="lr", tau="lr", final_p=math.inf)
    config = RunConfig(optimizer=optimizer, schedule=schedule, train=TrainConfig(max_steps=101))
    first, middle, last = (scheduled(config, step) for step in (0, 50, 100))
    share = 1 - 0.5 * 50 / 101
    assert first == {"lr": 0.1, "alpha": 2.0, "tau": 0.04, "p": 2.0, "betas": (0.0, 0.0)}
    for name, peak in (("lr", 0.1), ("alpha", 2.0), ("tau", 0.04)):
        assert middle[name] == pytest.approx(peak * share)
    assert middle["p"] == pytest.approx(3.0)  # 1/(p - 1) = 1/2, halfway from 1 to 0
    assert last["p"] == math.inf
    schedule.alpha, schedule.final_alpha = "constant", 8.0
    assert [scheduled(config, step)["alpha"] for step in (0, 50, 100)] == pytest.approx([2.0, 4.0, 8.0])
    optimizer.name = "lp_descent"  # which has p alone
    assert scheduled(config, 50).keys() == {"lr", "p"}
    optimizer.name = "adamw"
    assert scheduled(config, 50).keys() == {"lr"}


def test_corrected_betas_make_weighted_means():
    gradients = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beta1, beta2 = 0.8, 0.95
    m, raw = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for step, g in enumerate(gradients):
        b1, b2 = corrected_betas((beta1, beta2), step)
        c, raw_c = b1 * m + (1 - b1) * g, beta1 * raw + (1 - beta1) * g
        weight = beta1 * (1 - beta2**step) + 1 - beta1  # of all gradients in raw_c
        torch.testing.assert_close(c, raw_c / weight)
        m, raw = b2 * m + (1 - b2) * g, beta2 * raw + (1 - beta2) * g
        torch.testing.assert_close(m, raw / (1 - beta2 ** (step + 1)))  # as Adam has it


def test_norms_and_biases_are_not_decayed_unless_asked():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    decayed, kept = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert [p.dim() for p in decayed["params"]] == [2, 2]
    assert len(kept["params"]) == 3  # the norm's two and one bias: the other is frozen
    (everything,) = parameter_groups(model, OptimizerConfig(decay_norms_and_biases=True))
    assert len(everything["params"]) == 5


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


def test_flops_per_token_of_the_papers_model():
    from tests.training.forked import ROOT

    shape = yaml.safe_load((ROOT / "configs/llm/llama_100m_c4.yaml").read_text())["model"]
    config = LLMConfig()
    for name, value in shape.items():
        setattr(config.model, name, value)
    config.data.sequence_length = 1024
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    run = SimpleNamespace(config=config, accelerator=accelerator, say=lambda message: None)
    with torch.device("meta"):
        from stacey_dist.training.tasks.llm import build_model

        model = build_model(run, SimpleNamespace(vocab_size=32100, end_token_id=1))
    count = sum(p.numel() for p in model.parameters())
    layer = 4 * 640**2 + 3 * 640 * 1708 + 2 * 640
    assert count == 2 * 32100 * 640 + 12 * layer + 640 == 100_117_120
    task = LanguageModeling(run, SimpleNamespace(corpora=[corpus()], identity="windows", end_token_id=1), model)
    assert task.flops_per_unit == 6 * (count - 32100 * 640) + 12 * 12 * 640 * 1024


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


def agreed(rank):
    """Return what processes agree on whose replicas have summed the norm in another order."""
    engine = object.__new__(Engine)
    engine.accelerator = SimpleNamespace(num_processes=2, is_main_process=rank == 0)
    engine.agreement = Agreement(2, timeout=60.0)
    norm = torch.tensor(1.0) if rank == 0 else torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    answer = engine.agreement.ask(Requests(stop=rank == 1))
    outcomes = [engine._outcome(torch.tensor(value), norm).tolist() for value in (2.0 + rank, (0.0, torch.inf)[rank])]
    mine = [outcomes, answer(), engine.any_process(rank == 1), engine.any_process(False)]
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


@pytest.mark.slow
def test_processes_agree_on_the_loss_the_requests_and_the_first_ones_norm():
    first, second = spawn(agreed, 2)
    assert first == second == [[[5.0, 1.0, 0.0], [torch.inf, 1.0, 1.0]], Requests(stop=True), True, False]


def test_statistics_of_an_update_that_is_left_out_are_undone():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    norms = BatchNorms(model)
    for skipped in (0.0, 1.0):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        norms.keep()
        model(torch.randn(4, 2) if not skipped else torch.full((4, 2), torch.inf))
        moved = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert all(not torch.equal(buffer, before[name]) for name, buffer in moved.items())
        norms.restore(torch.tensor(skipped))
        expected = before if skipped else moved
        assert all(torch.equal(buffer, expected[name]) for name, buffer in model.named_buffers())


def test_the_statistics_are_those_of_the_model_that_an_engine_has_moved(monkeypatch):
    """On a GPU other buffers are put into the model."""

    def prepare(self, optimizer):
        self.model, self.optimizer = self.module._apply(torch.clone), optimizer

    monkeypatch.setattr(Engine, "_prepare", prepare)
    monkeypatch.setattr(Engine, "_make_capturable", lambda self: None)
    monkeypatch.setattr(engine_module, "fragments", lambda *sharded: [])
    model = torch.nn.BatchNorm1d(2)
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    engine = Engine(SimpleNamespace(accelerator=accelerator, config=RunConfig()), model, None)
    engine.optimizer = SimpleNamespace(param_groups=[], zero_grad=lambda: None)
    engine.begin_update({})
    model(torch.full((4, 2), torch.inf))
    engine.cancel_update()
    assert torch.equal(model.running_mean, torch.zeros(2))


def test_what_came_of_updates_is_counted_as_it_is_read():
    progress = Progress(step=3, skipped_steps=1)
    outcomes = Outcomes(progress, limit=2)
    for step, skipped in enumerate([0, 1, 1, 0, 1, 1, 1, 0], start=4):
        progress.step = step
        outcomes.add(torch.tensor([torch.nan if skipped else 0.5, 2.0, skipped]))
        if step == 6:  # as of a line that is due: it takes none of the limit away
            outcomes.read()
            assert (progress.skipped_steps, outcomes.skipped_in_a_row, outcomes.too_many) == (3, 2, "")
    assert outcomes.unread == 5
    outcomes.read()
    assert (progress.skipped_steps, outcomes.unread, outcomes.last) == (6, 0, (0.5, 2.0, 0.0))
    assert outcomes.too_many.startswith(
        "3 updates in a row, 8 to 10, had a loss or gradient that is not finite (loss nan"
    )


def test_bias_correction_is_the_same_however_many_were_skipped_once_nothing_depends_on_it():
    config = RunConfig(optimizer=OptimizerConfig(betas=(0.9, 0.9), bias_correction=True))
    first = next(step for step in range(1000) if not depends_on_skipped(config, step))
    assert 300 < first < 400
    after = [scheduled(config, first + more)["betas"] for more in range(500)]
    assert after == after[:1] * 500
    assert scheduled(config, first - 1)["betas"] != after[0]
    config.optimizer.bias_correction = False
    assert not depends_on_skipped(config, 0)


def test_runs_of_a_wandb_sweep_have_directories_of_their_own(monkeypatch):
    def directory(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config = RunConfig(run_dir="runs")
        separate_runs_of_a_sweep(config)
        return config.run_dir

    assert directory() == "runs"
    assert directory(WANDB_SWEEP_ID="s1", WANDB_RUN_ID="a") == "runs/sweep-s1/a"
    assert directory(WANDB_SWEEP_ID="s1", WANDB_RUN_ID="b") == "runs/sweep-s1/b"


def make_saver(directory):
    config = RunConfig(run_dir=str(directory))
    config.checkpoint.keep_last = 1
    run = SimpleNamespace(config=config, directory=directory, accelerator=SimpleNamespace(is_main_process=True))
    return run, Saver(run, None, "data")


def left(run):
    return sorted(int(path.name[5:]) for path in (run.directory / "checkpoints").iterdir())


@pytest.mark.parametrize("skipped", [False, True])
def test_the_checkpoint_before_wsds_decay_stays_if_it_came_an_update_later(tmp_path, skipped):
    run, saver = make_saver(tmp_path)
    run.config.schedule = ScheduleConfig("wsd", decay_steps=4)
    run.config.train.max_steps = 10
    assert [step for step in range(1, 11) if saver.is_due(step)] == [6]
    for step in (5, 7, 9, 10) if skipped else (5, 6, 7, 9, 10):
        checkpoint_path(run, step).mkdir(parents=True)
        saver._retain(checkpoint_path(run, step), None, Progress())
    before_decay = 7 if skipped else 6
    assert left(run) == [before_decay, 10]
    assert lr_share(before_decay - 1, run.config.schedule, 10) == 1.0
    assert checkpoint_before_decay(run.config, tmp_path / "checkpoints") == checkpoint_path(run, before_decay)


def test_callbacks_hear_of_no_checkpoint_that_is_deleted_already(tmp_path):
    run, saver = make_saver(tmp_path)
    checkpoint_path(run, 2).mkdir(parents=True)
    saver.complete.extend([checkpoint_path(run, 1), checkpoint_path(run, 2)])
    assert list(saver.take_complete()) == [checkpoint_path(run, 2)]
    assert not saver.complete


def test_the_best_checkpoint_stays_when_a_better_one_cannot_be_saved(tmp_path):
    run, saver = make_saver(tmp_path)
    progress = Progress()  # a run that goes on has it from its checkpoint
    for step, best in ((1, 1), (2, 1), (4, 3), (5, 5)):  # the best after update 3 was not saved
        checkpoint_path(run, step).mkdir(parents=True)
        saver._retain(checkpoint_path(run, step), best, progress)
        assert left(run) == {1: [1], 2: [1, 2], 4: [1, 4], 5: [5]}[step]


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


def loss_scales(rank):
    """Return the gradients that DeepSpeed applies in fp16 while its loss scale doubles; each is 0.5."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it asks for instructions that torch can do without
    found = {}
    for stage in (1, 2, 3):
        model = torch.nn.Linear(4, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        config = {
            "train_batch_size": 1,
            "zero_optimization": {"stage": stage},
            "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "loss_scale_window": 3},
            "gradient_clipping": 0.0,  # without it, DeepSpeed clips at 1.0
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wrapped, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), optimizer=optimizer, config=config
        )
        engine, before = object.__new__(DeepSpeedEngine), 0.0
        engine.accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
        engine.model, engine._batch_norms = wrapped, BatchNorms(model)
        found[stage] = []
        for update in range(8):
            infinite = update == 5  # the scale is halved
            output = wrapped(torch.full((1, 4), 0.5, dtype=torch.float16)).sum()
            wrapped.backward(output * (torch.inf if infinite else 1.0))
            engine.finish_update(torch.tensor(0.5))
            weight = float(deepspeed.utils.safe_get_full_fp32_param(next(model.parameters())).flatten()[0])
            found[stage].append((engine.scaler.cur_scale, before - weight))
            before = weight
    return found


@pytest.mark.slow
def test_deepspeed_divides_by_the_loss_scale_that_the_loss_was_multiplied_with():
    for stage, updates in spawn(loss_scales, 1).items():
        scales, applied = zip(*updates, strict=True)
        assert {256, 512} <= set(scales), stage
        assert applied == (0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.5, 0.5), stage
