"""STACEY, stochastic steepest descent with acceleration, as a torch optimizer."""

import math
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from stacey_dist.optim import kernels
from stacey_dist.optim.base import ChunkUpdate, ElementwiseOptimizer
from stacey_dist.optim.group_settings import (
    as_float,
    check_betas,
    check_choice,
    check_finite,
    check_state_dtype,
    require,
    rule_lr,
    state_dtype,
)
from stacey_dist.optim.kernels import Call, NoKernelError
from stacey_dist.optim.memory import local
from stacey_dist.optim.rounding import Store
from stacey_dist.optim.rule import StaceySettings, Variant, scale_with_lr, stacey_update


class Stacey(ElementwiseOptimizer):
    """STACEY(p,2), STACEY(p,p) and STACEY(2,p): algorithms 2, 3 and 4 of "Stochastic Steepest Descent with
    Acceleration for lp-Smooth Non-Convex Optimization" (anonymous authors, under review), the paper below.

    Each coordinate takes

        s(x)   = x / (|x|^((p-2)/(p-1)) + eps)
        c      = beta1 m + (1 - beta1) g
        y      = theta - lr s(c)                 (theta - lr c for (2,p))
        z'     = z - alpha c                     (a mirror step in the p-norm for (p,p) and (2,p))
        theta' = tau z' + (1 - tau) y - lr weight_decay theta
        m'     = beta2 m + (1 - beta2) g

    As in the paper, alpha and tau are constant: at lr = 0 a weight still moves, toward z. With ``lr_reference`` they
    are alpha lr / lr_reference and min(1, tau lr / lr_reference) instead, and lr = 0 freezes weights and z.

    An element's new value depends on that element alone, bit for bit, so any engine may shard the parameters.

    The defaults are safe, not tuned. With them the loss falls for all three variants, on PyTorch's own test problems
    and small networks, with losses of a tenth to ten times the usual size. They are the paper's p, tau and betas, with
    a tenth of the paper's lr and alpha: with 0.01 for both, (2,p) diverges there. The launchers have tuned settings
    (docs/how-to/settings.md). For language models begin with ``lr=1.2e-3, p=30, alpha=1.0, tau=4e-3,
    betas=(0.5, 0.7)``. Settings belong together: another variant or another p needs another lr, alpha and tau.

    Args:
        params: parameters or groups; every setting below may differ by group. float64 parameters are updated in
            float64, all others in float32. bfloat16 and float16 parameters need no float32 master copy: they are
            rounded stochastically.
        lr: eta, the primal step size, per update; a number or a one-element tensor. Schedulers change it.
        p: the norm, >= 2. Infinity is allowed for ``"p2"``, where s becomes the sign; the mirror step of the
            other two variants has no limit there: they take at most 1000.
        variant: ``"p2"``, ``"pp"`` or ``"2p"``.
        alpha: the dual step size; constant unless there is an ``lr_reference``.
        tau: the weight of z in the coupling, within [0, 1]; 0 switches the acceleration off.
        betas: beta1, which interpolates for the step, and beta2, the decay of m; within [0, 1).
        eps: added to the denominator of s, outside the power.
        weight_decay: lambda, decoupled: multiplied by the scheduled lr, acting on the old weight.
        z_init: ``"params"`` starts z as a copy of the parameter, as linear coupling does; ``"zeros"`` as printed
            in the paper.
        state_dtype: dtype of z and m: torch.bfloat16, torch.float32 or torch.float64, or its name.
        rounding: ``"stochastic"`` or ``"nearest"``, for bfloat16 states and for bfloat16 and float16 parameters.
            Rounded to nearest, a bfloat16 z loses most of its movement.
        seed: an integer >= 0, part of the hash that makes the random bits of stochastic rounding.
        fused: None picks the fastest implementation, True demands a kernel, False takes the plain rule. All give the
            same bits.
        capturable: keep step counts on the GPU, and wait for nothing that is there, so that `step` can be
            captured in a CUDA graph; ``lr`` is to be a tensor on the GPU if it is to change. Implies ``fused=True``.
        lr_reference: the lr at which alpha and tau hold, as the peak of a schedule; an update at another lr has them in
            proportion (see above). For groups with learning rates of their own, as in layer-wise decay, and for
            schedules that end at 0. None: alpha and tau are constant.

    State of a parameter: ``step`` (int64 scalar, on the CPU unless ``capturable``), ``z`` and ``m`` (shaped as the
    parameter).

    Raises:
        ValueError: a setting is out of range, or a parameter is complex, an integer, or on MPS.
        RuntimeError: ``fused=True`` or ``capturable=True`` where there is no kernel; sparse gradients (in
            `step`).
    """

    state_names = ("z", "m")
    _later_settings: ClassVar[dict[str, Any]] = {"lr_reference": None}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        p: float = 2.8,
        variant: Variant = "p2",
        alpha: float = 1e-3,
        tau: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        z_init: str = "params",
        state_dtype: torch.dtype | str = torch.bfloat16,
        rounding: str = "stochastic",
        seed: int = 0,
        fused: bool | None = None,
        capturable: bool = False,
        lr_reference: float | None = None,
    ) -> None:
        rule = dict(lr=lr, p=p, variant=variant, alpha=alpha, tau=tau, betas=betas, eps=eps, weight_decay=weight_decay)
        states = dict(z_init=z_init, state_dtype=state_dtype, rounding=rounding, seed=seed)
        launch = dict(fused=fused, capturable=capturable)
        super().__init__(params, {**rule, "lr_reference": lr_reference, **states, **launch})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice(self, group, "variant", get_args(Variant))
        check_choice(self, group, "z_init", ("params", "zeros"))
        if group["variant"] != "p2":
            p, suffix = group["p"], 'unless variant is "p2"'
            require(self, p < math.inf, "p", p, f"it must be finite {suffix}")
            require(self, p <= 1000, "p", p, f"it must be at most 1000 {suffix}")  # see `power.ZERO_EXPONENT`
        check_finite(self, group, "alpha")
        group["tau"] = as_float(self, "tau", group["tau"])
        require(self, 0 <= group["tau"] <= 1, "tau", group["tau"], "it must be within [0, 1]")
        check_betas(self, group)
        check_state_dtype(self, group)
        if group["lr_reference"] is not None:
            value = group["lr_reference"] = as_float(self, "lr_reference", group["lr_reference"])
            require(self, 0 < value < math.inf, "lr_reference", value, "it must be a finite number > 0, or None")
        if group["capturable"]:
            self._check_capturable(group)
        if group["fused"]:
            self._check_fused(group)

    def _check_capturable(self, group: dict[str, Any]) -> None:
        require(self, group["fused"] is not False, "fused", False, "it must be None or True with capturable=True")
        group["fused"] = True
        for param in group["params"]:
            require(self, param.device.type == "cuda", "capturable", True, f"a parameter is on {param.device}")
        lr = group["lr"]
        on_gpu = not isinstance(lr, Tensor) or lr.device.type == "cuda"
        require(self, on_gpu, "lr", lr, "a tensor must be on the GPU with capturable=True")

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return z, a copy of the parameter or zeros, and m, zeros."""
        dtype = state_dtype(group)
        start = param.detach() if group["z_init"] == "params" else torch.zeros_like(param)
        return {"z": start.to(dtype, copy=True), "m": torch.zeros_like(param, dtype=dtype)}

    def _had_no_gradient(self, state: dict[str, Any]) -> Tensor:
        return local(state["m"]) == 0

    def _check_fused(self, group: dict[str, Any]) -> None:
        try:
            for device_type in {param.device.type for param in group["params"]}:
                kernels.find(device_type)
        except NoKernelError as error:
            raise RuntimeError(f"Stacey: fused=True, but {error}; use fused=None") from error
        dtypes = {param.dtype for param in group["params"]} | {state_dtype(group)}
        if refused := dtypes - set(kernels.DTYPES):
            names = " and ".join(map(str, refused))
            raise RuntimeError(f"Stacey: fused=True, but {names} is neither float32 nor bfloat16; use fused=None")
        self._step_supports_amp_scaling = True  # as in torch's: GradScaler sets grad_scale and found_inf

    def _kernel_call(self, group: dict[str, Any]) -> Call | None:
        if group["fused"] is False:
            return None
        capturable = group["capturable"]
        lr_on_device = capturable and isinstance(group["lr"], Tensor)
        return Call(
            self._settings({**group, "lr": 0.0, "lr_reference": None} if lr_on_device else group, torch.float32),
            group["rounding"] == "stochastic",
            group["seed"],
            grad_scale=getattr(self, "grad_scale", None),
            capturable=capturable,
            lr=group["lr"] if lr_on_device else None,
            lr_reference=group["lr_reference"] if lr_on_device else None,
            found_inf=getattr(self, "found_inf", None) if capturable else None,
        )

    def _settings(self, group: dict[str, Any], dtype: torch.dtype) -> StaceySettings:
        beta1, beta2 = group["betas"]
        lr, alpha, tau, log2_alpha = rule_lr(group["lr"], dtype), group["alpha"], group["tau"], None
        reference = group["lr_reference"]
        if reference is not None:
            rate = torch.tensor([lr], dtype=torch.float64, device="cpu")
            alpha, tau, *log2_alpha = scale_with_lr(rate, reference, alpha, tau, dtype).tolist()
        return StaceySettings(
            lr=lr,
            p=group["p"],
            variant=group["variant"],
            alpha=alpha,
            tau=tau,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            log2_alpha=None if log2_alpha is None else tuple(log2_alpha),
        )

    def _chunk_update(self, group: dict[str, Any], step: int, dtype: torch.dtype) -> ChunkUpdate:
        settings = self._settings(group, dtype)
        store = Store(group["rounding"], group["seed"], step)

        def update(weight: Tensor, gradient: Tensor, z: Tensor, m: Tensor) -> None:
            new, z_new, m_new = stacey_update(weight.to(dtype), gradient, z.to(dtype), m.to(dtype), settings)
            store.states(z, m, z_new, m_new)
            store.weight(weight, new, gradient)

        return update
