"""The base class of `Stacey` and `LpDescent`: everything about being a `torch.optim.Optimizer` except the rule.

A subclass checks its further settings (`_check_group`), creates its state (`initial_state`), updates one chunk of one
parameter (`_chunk_update`) and, where there are kernels for it, says what they need (`_kernel_call`). This class goes
through the parameters, unwraps DTensors, counts steps, and gives a kernel what it can take and the rest to the plain
rule in chunks.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from stacey_dist.optim import kernels
from stacey_dist.optim.chunks import chunks
from stacey_dist.optim.deepspeed_support import support_in_deepspeed
from stacey_dist.optim.group_settings import check_common_settings, state_dtype
from stacey_dist.optim.kernels import Call, Kernel, NoKernelError, Row
from stacey_dist.optim.memory import (
    are_simple,
    defect,
    fill_their_storages,
    full_tensor,
    is_cut_short,
    local,
    readable,
)
from stacey_dist.optim.one_launch import Parts, rows_of_one_launch
from stacey_dist.optim.saved_state import like_parameter, load, step_count

# A parameter, and this rank's part of it and of its gradient.
Part = tuple[Tensor, Tensor, Tensor]
# Updates one chunk in place: (weight, gradient, *state tensors).
ChunkUpdate = Callable[..., None]


class ElementwiseOptimizer(Optimizer):
    """An optimizer whose update of an element depends on that element alone.

    State of a parameter: `step`, the number of updates, an int64 scalar on the CPU (on the parameter's device if the
    group is `capturable`; torch's own optimizers have a float32, which stops at 2^24), and the tensors named in
    `state_names`, shaped and placed as the parameter (DTensors for a DTensor).

    Like torch's fused optimizers, `step` reads two optional attributes, one-element tensors, which
    `torch.amp.GradScaler` sets if `fused=True`. Gradients are divided by `grad_scale` during the update (multiplied by
    its reciprocal, rounded to float32); the gradient tensors do not change. If `found_inf` is not 0, the step changes
    nothing. `scaled_gradients` sets `grad_scale` for the steps within it.

    A parameter's steps are counted from the first one with `lr` > 0. Until then, an element that has had no nonzero
    gradient does not change, and its state is initialized again from its weight at the next step:
    `torch.distributed.checkpoint` makes an optimizer create its state by a step with `lr` 0 and zero gradients, which
    must change nothing.
    """

    state_names: tuple[str, ...] = ()
    _later_settings: ClassVar[dict[str, Any]] = {}
    """Settings that pickles of older versions lack, with their defaults."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        support_in_deepspeed(type(self))
        super().__init__(params, defaults)
        self.forget_counted()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was pickled; settings that an older version did not have take their defaults."""
        super().__setstate__(state)
        for group in (self.defaults, *self.param_groups):
            group.update({**self._later_settings, **group})
        self.forget_counted()

    def forget_counted(self) -> None:
        """Forget which parameters have made a counted step. Called after their state was replaced."""
        self._counted: set[Tensor] = set()
        self._created_here: set[Tensor] = set()
        """Parameters whose state was created here, in a step that was not counted."""

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a setting that is out of range; put settings into their canonical form."""
        check_common_settings(self, group)

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the tensors named in `state_names` as they begin, for a parameter or a part of one."""
        return {}

    def _chunk_update(self, group: dict[str, Any], step: int, dtype: torch.dtype) -> ChunkUpdate:
        """Return the update of one chunk, for arithmetic in `dtype` (float32 or float64), as update number `step`.

        The update gets gradients in `dtype`.
        """
        raise NotImplementedError

    def _kernel_call(self, group: dict[str, Any]) -> Call | None:
        """Return what a kernel has to know of a group; None if there is none for this optimizer, or none is wanted."""
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings are checked like the constructor's. Complex parameters are refused."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for param in group["params"]:
                if param.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                    raise ValueError(
                        f"{type(self).__name__}: a parameter of dtype {param.dtype} is not supported; "
                        "allowed are float64, float32, bfloat16 and float16"
                    )
                if param.device.type == "mps":
                    raise ValueError(f"{type(self).__name__}: a parameter on mps is not supported; it has no float64")
                if reason := defect(local(param)):
                    raise ValueError(f"{type(self).__name__}: a parameter cannot be updated: {reason}")
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo  # it reads addresses, of which a compiler knows nothing
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, in place. Return what `closure` returns, if it is given.

        Raises RuntimeError for sparse gradients, for a gradient laid out over ranks unlike its parameter, for a
        parameter or gradient whose memory is shared between its elements or was freed, and in the capture of a CUDA
        graph without `capturable`. Nothing is changed then.
        """
        if len(self._counted) > len(self.state):  # a program has replaced parameters, which this must not keep alive
            self._counted.intersection_update(self.state)
            self._created_here.intersection_update(self.state)
        if kernels.is_capturing() and not all(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: step() was captured in a CUDA graph without capturable=True; replays would "
                "not count steps. Set capturable=True in every group"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if (divisor := getattr(self, "grad_scale", None)) is not None:
            self.grad_scale = full_tensor(divisor)  # here, where all ranks are: below, each has work of its own
        # All are checked before anything is changed.
        work = [(group, self._parts_to_update(group)) for group in self.param_groups]
        found_inf = getattr(self, "found_inf", None)
        # Kernels of capturable groups look at `found_inf` themselves, without waiting for the device.
        if found_inf is not None and not all(g.get("capturable") for g in self.param_groups) and bool(found_inf):
            work = [(group, parts) for group, parts in work if group.get("capturable")]
        for group, parts in work:
            self._update_group(group, parts)
        return loss

    def _parts_to_update(self, group: dict[str, Any]) -> Parts:
        """Return this rank's parts of the parameters that have a gradient. Raises what `step` does."""
        params = [param for param in group["params"] if param.grad is not None]
        parts = Parts(params, params, [param.grad for param in params], True)
        tensors = params + parts.gradients
        if not (are_simple(tensors) and fill_their_storages(tensors)):
            gradients = [readable(local(self._checked_gradient(param))) for param in params]
            parts = Parts(params, list(map(local, params)), gradients, False)
        if group.get("fused"):
            for pair in zip(parts.weights, parts.gradients, strict=True):
                if (reason := kernels.refusal(pair)) is not None:
                    raise RuntimeError(f"{type(self).__name__}: fused=True, but {reason}")
        return parts

    def _update_group(self, group: dict[str, Any], parts: Parts) -> None:
        """Update parts of one group: those that a kernel can take in one launch, the others by the plain rule."""
        call = self._kernel_call(group)
        if call is not None and self._update_at_once(call, group, parts):
            return
        dtype = state_dtype(group) if self.state_names else None
        launches: dict[Any, tuple[Kernel, list[Row]]] = {}
        others: list[Part] = []
        for part in zip(*parts[:3], strict=True):
            param = part[0]
            state = self.state[param]
            if (param not in self._counted or not state) and self._make_uncounted_step(group, part):
                continue
            self._convert_state(state, param, group, dtype)
            if call is None or not self._add_row(launches, part):
                others.append(part)
        if call is not None:
            for launch, rows in launches.values():
                launch(rows, call)
        # The plain rule reads numbers that may be on a GPU, which a kernel does not wait for.
        found_inf = getattr(self, "found_inf", None)
        if others and (found_inf is None or not bool(found_inf)):
            self._update_plainly(group, others)

    def _update_at_once(self, call: Call, group: dict[str, Any], parts: Parts) -> bool:
        """Update parts of one group in one launch, as most steps do. Return False, with nothing done, if it cannot."""
        states = [self.state[param] for param in parts.params]
        if not (states and all(states) and self._counted.issuperset(parts.params)):
            return False
        rows = rows_of_one_launch(parts, states, state_dtype(group), bool(group.get("capturable")))
        if rows is None or (launch := kernel(rows[0].weight.device.type)) is None:
            return False
        launch(rows, call)
        return True

    def _make_uncounted_step(self, group: dict[str, Any], part: Part) -> bool:
        """Prepare a parameter's first counted step. If its lr is 0, make the step without counting it; return True.

            no state                      create it
            state with step > 0           it was loaded: an ordinary step
            state created here, step 0    initialize elements that had no gradient so far again, from the weight now

        Whether a step is counted, and what it changes, must not depend on other elements: ranks have different ones.
        """
        param, weight, gradient = part
        state = self.state[param]
        is_new = not state
        if is_new:  # all of it at once: there may be no memory for it
            state.update(step=step_count(0, param, group), **self.initial_state(param, group))
            self._created_here.add(param)
        self._counted.add(param)  # `_update_group` below does not come here again
        if not is_new and (kernels.is_capturing() or int(state["step"]) != 0):  # it was loaded
            return False
        if not is_new and param in self._created_here:
            untouched = self._had_no_gradient(state)
            for name, initial in self.initial_state(param, group).items():
                torch.where(untouched, local(initial), local(state[name]), out=local(state[name]))
        if float(group["lr"]) != 0.0:
            return False
        untouched = self._had_no_gradient(state) & (gradient == 0)
        if not untouched.all():
            tensors = [weight, *(local(state[name]) for name in self.state_names)]
            before = [tensor.clone() for tensor in tensors]
            state["step"].fill_(-1)  # the step increments it, and must not be counted
            self._update_group(group, Parts([param], [weight], [gradient], False))
            state["step"].zero_()
            for tensor, old in zip(tensors, before, strict=True):
                torch.where(untouched, old, tensor, out=tensor)
        self._counted.discard(param)
        return True

    def _had_no_gradient(self, state: dict[str, Any]) -> Tensor:
        """Return which elements have had no gradient other than 0; a scalar holds for all."""
        return torch.tensor(True, device="cpu")

    def _convert_state(
        self, state: dict[str, Any], param: Tensor, group: dict[str, Any], dtype: torch.dtype | None
    ) -> None:
        """Convert states to the group's dtype, and the count of steps to what kernels take; loaders may change both."""
        step = state["step"]
        on_gpu = param.is_cuda and bool(group.get("capturable"))
        if not isinstance(step, Tensor) or step.dtype is not torch.int64 or step.is_cuda != on_gpu:
            state["step"] = step_count(int(step), param, group)
        for name in self.state_names:
            if state[name].dtype != dtype:
                state[name] = state[name].to(dtype)

    def _add_row(self, launches: dict[Any, tuple[Kernel, list[Row]]], part: Part) -> bool:
        """Add a parameter to the launch for its device and dtypes. Return False if no kernel can take it."""
        param, weight, gradient = part
        state = self.state[param]
        row = Row.of(weight, gradient, state)
        key = kernels.launch_key(row)
        if key is None and kernels.refusal((weight, gradient)) is None:
            # The parameter's order in memory has changed, as by `model.to(memory_format=...)`.
            state.update({name: like_parameter(state[name], param, state[name].dtype) for name in self.state_names})
            row = Row.of(weight, gradient, state)
            key = kernels.launch_key(row)
        if key is None:
            return False
        if key not in launches:
            if (found := kernel(weight.device.type)) is None:
                return False
            launches[key] = found, []
        launches[key][1].append(row)
        return True

    def _update_plainly(self, group: dict[str, Any], parts: list[Part]) -> None:
        """Update parts by the plain rule."""
        divisor = getattr(self, "grad_scale", None)
        # The number to multiply gradients with, as torch's GradScaler does.
        scale = None if divisor is None else float(divisor.double().reciprocal().float())
        updates: dict[tuple[int, torch.dtype], ChunkUpdate] = {}
        for param, weight, gradient in parts:
            state = self.state[param]
            state["step"] += 1
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            key = (int(state["step"]), dtype)
            if key not in updates:
                updates[key] = self._chunk_update(group, *key)
            states = (local(state[name]) for name in self.state_names)
            for chunk, chunk_gradient, *rest in chunks([t.detach() for t in (weight, gradient, *states)]):
                chunk_gradient = chunk_gradient.to(dtype) if scale is None else chunk_gradient.to(dtype) * scale
                updates[key](chunk, chunk_gradient, *rest)

    def _checked_gradient(self, param: Tensor) -> Tensor:
        """Return the gradient, laid out over ranks as its parameter. Raises what `step` does."""
        gradient = param.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"{type(self).__name__}: a gradient of layout {gradient.layout} is not supported; "
                "use dense gradients (nn.Embedding(..., sparse=False))"
            )
        if reason := defect(local(param)):
            raise RuntimeError(f"{type(self).__name__}: a parameter cannot be updated: {reason}")
        if gradient.is_nested or is_cut_short(local(gradient)):
            raise RuntimeError(f"{type(self).__name__}: a gradient is nested, or its storage was resized and freed")
        placed, wanted = getattr(gradient, "placements", None), getattr(param, "placements", None)
        if placed == wanted:
            return gradient
        # As sequence parallelism leaves it, it is still to be summed over ranks.
        if placed is None or wanted is None or not any(placement.is_partial() for placement in placed):
            raise RuntimeError(
                f"{type(self).__name__}: a gradient placed {placed} does not fit its parameter, placed {wanted}"
            )
        return gradient.redistribute(placements=wanted)  # type: ignore[attr-defined]

    @contextmanager
    def scaled_gradients(self, divisor: Tensor) -> Iterator[None]:
        """Divide gradients by `divisor` in the steps made within this context. The gradients themselves do not change.

        With `norm / max_norm` for a divisor, gradients are clipped to `max_norm` in the pass that updates the weights.

        Args:
            divisor: a positive tensor of one element; gradients are multiplied by its reciprocal, rounded to float32.
        """
        before = getattr(self, "grad_scale", None)  # contexts may be nested
        self.grad_scale = divisor
        try:
            yield
        finally:
            vars(self).pop("grad_scale", None)  # `torch.amp.GradScaler` may have deleted it
            if before is not None:
                self.grad_scale = before

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict. The states come back in the group's `state_dtype`.

        Raises ValueError if they have other shapes than the parameters, or are another optimizer's, or a setting is out
        of range; nothing is loaded then.
        """
        load(self, super().load_state_dict, state_dict)


@functools.cache
def kernel(device_type: str) -> Kernel | None:
    """Return the kernel for a type of device; None, after a warning that says why, if there is none."""
    try:
        return kernels.find(device_type)
    except NoKernelError as error:
        warnings.warn(f"stacey_dist runs its plain rule, which is slower: {error}", stacklevel=2)
        return None
