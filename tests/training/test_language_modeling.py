"""The task of language models: batches, losses, evaluations."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from stacey_dist.data.mixture import MixedSampler
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.errors import SettingsError
from stacey_dist.training.ahead import Ahead, Transfer
from stacey_dist.training.settings.llm_config import LLMConfig
from stacey_dist.training.tasks.llm import LanguageModeling


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
