"""A bad setting is refused at once with its name, its value and what is allowed."""

import math

import pytest
import torch

from stacey_dist import LpDescent, Stacey

BAD = [
    (dict(lr=-1.0), r"lr=-1.0 .* finite number >= 0"),
    (dict(lr=math.nan), "lr=nan"),
    (dict(lr="fast"), "lr='fast' .* must be a number"),
    (dict(lr=10**400), r"lr=1000.*\.\.\. is not allowed; it must be a finite number >= 0"),
    (dict(lr=10**5000), "lr=<an integer of thousands of digits>"),
    (dict(eps=-(10**400)), "eps=-inf"),
    (dict(lr=torch.ones(2)), "lr=.* Tensor lr must be 1-element"),
    (dict(p=1.9), "p=1.9 .* >= 2"),
    (dict(p=math.nan), "p=nan"),
    (dict(p="three"), "p='three'"),
    (dict(eps=-1e-8), "eps=-1e-08"),
    (dict(eps=True), "eps=True .* number"),
    (dict(weight_decay=-0.1), "weight_decay=-0.1"),
    (dict(weight_decay=math.inf), "weight_decay=inf"),
    (dict(seed=True), "seed=True"),
    (dict(seed=0.5), "seed=0.5"),
    (dict(seed=-1), "seed=-1"),
    (dict(rounding="up"), "rounding='up'"),
]
BAD_STACEY = [
    (dict(p=math.inf, variant="pp"), 'p=inf .* finite unless variant is "p2"'),
    (dict(p=math.inf, variant="2p"), "p=inf"),
    (dict(p=1001, variant="2p"), "p=1001.0 .* at most 1000"),
    (dict(variant="p3"), 'variant=\'p3\' .* "p2", "pp", "2p"'),
    (dict(alpha=-0.1), "alpha=-0.1"),
    (dict(tau=1.5), r"tau=1.5 .* within \[0, 1\]"),
    (dict(tau=-0.1), "tau=-0.1"),
    (dict(betas=(0.9, 1.0)), "betas"),
    (dict(betas=0.9), "betas=0.9 .* two numbers"),
    (dict(betas=(0.9,)), "betas"),
    (dict(lr_reference=0.0), "lr_reference=0.0 .* > 0"),
    (dict(lr_reference=-1.0), "lr_reference=-1.0 .* > 0"),
    (dict(z_init="ones"), 'z_init=\'ones\' .* "params", "zeros"'),
    (dict(state_dtype=torch.float16), "state_dtype=torch.float16 .* bfloat16, float32, float64"),
    (dict(state_dtype="int8"), "state_dtype='int8'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
@pytest.mark.parametrize("optimizer_class", [Stacey, LpDescent])
def test_bad_settings(optimizer_class, settings, message):
    with pytest.raises(ValueError, match=f"{optimizer_class.__name__}: {message}"):
        optimizer_class([torch.nn.Parameter(torch.ones(2))], **settings)


@pytest.mark.parametrize(("settings", "message"), BAD_STACEY)
def test_bad_stacey_settings(settings, message):
    with pytest.raises(ValueError, match=f"Stacey: {message}"):
        Stacey([torch.nn.Parameter(torch.ones(2))], **settings)
    with pytest.raises(ValueError, match=f"Stacey: {message}"):  # in a group just as well
        Stacey([{"params": [torch.nn.Parameter(torch.ones(2))], **settings}])


def test_settings_as_json_and_yaml_write_them():
    optimizer = Stacey(
        [torch.nn.Parameter(torch.ones(2))],
        lr="1e-3",
        p="inf",
        betas=["0.9", 0.99],
        eps="1e-8",
        state_dtype="float32",
    )
    group = optimizer.param_groups[0]
    assert group["p"] == math.inf
    assert group["betas"] == (0.9, 0.99)
    assert group["lr"] == 1e-3
    assert group["state_dtype"] == "float32"


@pytest.mark.parametrize("fused", [None, True])
def test_fused_on_meta_parameters_is_refused(fused):
    params = [torch.nn.Parameter(torch.ones(2, device="meta"))]
    if fused is None:
        Stacey(params, fused=None)
        return
    with pytest.raises(RuntimeError, match="Stacey: fused=True, but no kernel is written for devices of type meta"):
        Stacey(params, fused=True)
