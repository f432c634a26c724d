"""PyTorch's `OptimizerInfo` for the optimizers here: what test_torch_suite.py gives them.

Apart, since torch.testing takes more than a second to import, which each of pytest's processes would do to find tests.
"""

import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput

from stacey_dist import LpDescent, Stacey


def stacey_inputs(device, dtype=None):
    return [
        OptimizerInput(params=None, kwargs={}, desc="default"),
        OptimizerInput(params=None, kwargs={"lr": 0.01}, desc="non-default lr"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.001)}, desc="Tensor lr"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.1}, desc="weight_decay"),
        OptimizerInput(params=None, kwargs={"p": 8.0, "state_dtype": torch.float32}, desc="p, float32 states"),
        OptimizerInput(params=None, kwargs={"z_init": "zeros"}, desc="z from 0"),
        OptimizerInput(params=None, kwargs={"lr_reference": 1e-3}, desc="alpha and tau follow lr"),
        OptimizerInput(params=None, kwargs={"fused": False}, desc="plain rule"),
    ]


def lp_descent_inputs(device, dtype=None):
    return [
        OptimizerInput(params=None, kwargs={}, desc="default"),
        OptimizerInput(params=None, kwargs={"lr": 0.001}, desc="non-default lr"),
        OptimizerInput(params=None, kwargs={"lr": torch.tensor(0.001)}, desc="Tensor lr"),
        OptimizerInput(params=None, kwargs={"weight_decay": 0.1}, desc="weight_decay"),
        OptimizerInput(params=None, kwargs={"p": 2.0, "eps": 1e-8}, desc="p, eps"),
    ]


def errors(device, dtype):
    bad = [
        ({"lr": torch.tensor([0.001, 0.001])}, ValueError, "Tensor lr must be 1-element"),
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay=-1.0"),
    ]
    inputs = [
        ErrorOptimizerInput(
            OptimizerInput([Parameter(torch.ones(1))], kwargs, str(kwargs)), error_type=e, error_regex=r
        )
        for kwargs, e, r in bad
    ]
    param = Parameter(torch.ones(1))
    for params, error, regex in (
        ([param, param], UserWarning, "duplicate parameters"),
        (param, TypeError, "should be an iterable of Tensors or dicts"),
        ([], ValueError, "empty parameter list"),
        ([[param]], TypeError, "can only optimize Tensors"),
        ([param * 2], ValueError, "can't optimize a non-leaf Tensor"),
    ):
        inputs.append(ErrorOptimizerInput(OptimizerInput(params, {}, regex), error_type=error, error_regex=regex))
    return inputs


def info(optimizer_class, inputs, **fixed):
    """Return an OptimizerInfo whose optimizers have the settings `fixed`."""

    def with_fixed(device, dtype=None):
        return [OptimizerInput(i.params, {**fixed, **i.kwargs}, i.desc) for i in inputs(device)]

    return OptimizerInfo(
        optimizer_class,
        optim_inputs_func=with_fixed,
        scheduler_inputs=(
            [lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10), lr_scheduler.ReduceLROnPlateau],
            [lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4), lr_scheduler.ReduceLROnPlateau],
            [lambda opt: lr_scheduler.PolynomialLR(opt, power=0.9, total_iters=400)],
        ),
        supported_impls=(),
        not_og_supported_flags=("lr_reference", "capturable") if optimizer_class is Stacey else (),
        supports_complex=False,
        optim_error_inputs_func=errors,
    )


OPTIM_DB = {
    **{variant: info(Stacey, stacey_inputs, variant=variant) for variant in ("p2", "pp", "2p")},
    "lp_descent": info(LpDescent, lp_descent_inputs),
}
