"""The schedule of the learning rate and what follows it; the groups of parameters."""

import math

import pytest
import torch

from stacey_dist.training.optimizers import corrected_betas, depends_on_skipped, lr_share, parameter_groups, scheduled
from stacey_dist.training.settings.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig


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


def test_bias_correction_is_the_same_however_many_were_skipped_once_nothing_depends_on_it():
    config = RunConfig(optimizer=OptimizerConfig(betas=(0.9, 0.9), bias_correction=True))
    first = next(step for step in range(1000) if not depends_on_skipped(config, step))
    assert 300 < first < 400
    after = [scheduled(config, first + more)["betas"] for more in range(500)]
    assert after == after[:1] * 500
    assert scheduled(config, first - 1)["betas"] != after[0]
    config.optimizer.bias_correction = False
    assert not depends_on_skipped(config, 0)


def test_norms_and_biases_are_not_decayed_unless_asked():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    decayed, kept = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert [p.dim() for p in decayed["params"]] == [2, 2]
    assert len(kept["params"]) == 3  # the norm's two and one bias: the other is frozen
    (everything,) = parameter_groups(model, OptimizerConfig(decay_norms_and_biases=True))
    assert len(everything["params"]) == 5
