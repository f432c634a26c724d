"""What comes of an update: whether it is skipped, and what the processes agree on."""

from types import SimpleNamespace

import pytest
import torch

from stacey_dist.training import engine as engine_module
from stacey_dist.training.batch_norms import BatchNorms
from stacey_dist.training.deepspeed_engine import DeepSpeedEngine
from stacey_dist.training.engine import Engine
from stacey_dist.training.processes.requests import Agreement, Requests
from stacey_dist.training.progress import Outcomes, Progress
from stacey_dist.training.settings.config import RunConfig
from tests.sharding.processes import spawn


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
