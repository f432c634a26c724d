"""The sample that a language model writes after an evaluation."""

import math
from types import SimpleNamespace

import pytest

from stacey_dist.training.reports.samples import Samples


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_model_whose_loss_is_not_finite_writes_none(loss):
    """On a GPU, drawing a token from probabilities that are not finite ends the process before a save."""
    Samples(None, 8).on_evaluation_end(SimpleNamespace(run=None), {"eval_loss": loss})


def test_a_model_that_cannot_generate_says_so_and_trains_on(monkeypatch):
    said, logged, modes = [], [], []

    def fail(*_):
        raise ValueError("this class has\nno generate")

    monkeypatch.setattr("stacey_dist.training.reports.samples.sample", fail)
    monkeypatch.setattr("stacey_dist.training.reports.samples.log", lambda run, row: logged.append(row))
    model = SimpleNamespace(train=lambda: modes.append("training"))
    run = SimpleNamespace(say=said.append, config=SimpleNamespace(train=SimpleNamespace(max_steps=9)))
    training = SimpleNamespace(run=run, step=3, engine=SimpleNamespace(model=model))
    Samples(None, 8).on_evaluation_end(training, {"eval_loss": 2.0})
    assert said == ["step 3/9  sample: none, for the model cannot generate: this class has no generate"]
    assert modes == ["training"]
