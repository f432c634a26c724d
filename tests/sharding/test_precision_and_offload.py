"""Bare DeepSpeed programs: bf16 and fp16 sections, and offload of the optimizer, are as exact as fp32."""

import itertools

import pytest
import torch

from stacey_dist.sharding import fragments
from tests.sharding.engines import Trainer, assert_equal, gather
from tests.sharding.problem import CASES, STEPS, Awkward, gradients, group_settings, one_process
from tests.sharding.processes import outcome, spawn
from tests.shared import made_once

pytestmark = pytest.mark.slow

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 256.0}}  # exact, and overflows nowhere
# At stage 0, DeepSpeed 0.19 divides gradients by a scale that it has not multiplied the loss with.
FP16_STAGE_0 = {"fp16": {"enabled": True, "loss_scale": 1.0}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
OPTIONS = {
    "bf16": (BF16, torch.bfloat16),
    "fp16": (FP16, torch.float16),
    "fp16 unscaled": (FP16_STAGE_0, torch.float16),
    "bf16 accumulated in fp32": (BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, torch.bfloat16),
    "offload": (OFFLOAD, torch.float32),
    "offload bf16": (OFFLOAD | BF16, torch.bfloat16),
}
STAGES = {
    "bf16": "0123",
    "fp16": "123",
    "fp16 unscaled": "0",
    "bf16 accumulated in fp32": "123",
    "offload": "123",
    "offload bf16": "123",
}
CHECKS = [(f"zero{stage}", option) for option, stages in STAGES.items() for stage in stages]
CASE_NAMES = ("p2-stochastic", "pp-nearest", "lp_descent")


def in_ci(world_size, key, case):
    """In CI each engine with an option meets one case on one rank and another on two; all meet with -m exhaustive."""
    return (world_size + CHECKS.index(key) + CASE_NAMES.index(case)) % 3 == 0


ALL = list(itertools.product((1, 2), CHECKS, CASE_NAMES))


def check(engine, option, case):
    sections, dtype = OPTIONS[option]
    model = Awkward(scalar=False)
    trainer = Trainer(engine, model, group_settings(case), *CASES[case], **dict(sections))
    for step in range(STEPS):
        trainer.step(gradients(step, model))
    expected = one_process(case, scalar=False, start_dtype=dtype, scheduled=False)
    parts = fragments(trainer.model, trainer.optimizer)
    assert all(f.weight.dtype == torch.float32 for f in parts)
    assert_equal(gather(parts), expected)
    # The weights that the model computes with are the masters, rounded.
    for name, param in model.named_parameters():
        if param.requires_grad and not hasattr(param, "ds_id"):
            assert param.dtype == dtype
            assert torch.equal(param.cpu(), expected[name][0].to(dtype)), name


def all_checks(rank, world_size, quick):
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for instructions that torch can do without
    chosen = [(key, case) for world, key, case in ALL if world == world_size and in_ci(world, key, case) == quick]
    return {(*key, case): outcome(check, *key, case) for key, case in chosen}


def check_all(_, device, world_size, quick):
    return spawn(all_checks, world_size, world_size, quick, device=device)


@pytest.mark.parametrize(
    ("device", "world_size", "key", "case"),
    [
        *(pytest.param("cpu", *one, marks=() if in_ci(*one) else pytest.mark.exhaustive) for one in ALL),
        *(pytest.param("cuda", *one, marks=pytest.mark.gpu(devices=one[0])) for one in ALL),
    ],
)
def test_low_precision_and_offload_equal_one_process(device, world_size, key, case):
    failure = made_once(check_all, device, world_size, in_ci(world_size, key, case))[(*key, case)]
    assert failure is None, failure
