"""What `Stacey` and `LpDescent` share: everything about being a `torch.optim.Optimizer` except the rule.

A subclass checks its settings (`_check_group`), makes its state (`_init_state`) and updates one chunk of one
parameter (`_prepare`). This class walks the parameters, unwraps DTensors, counts steps, gives a kernel what it can
take and cuts the rest into chunks, so that a step's temporaries do not grow with the parameter.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from stacey_dist.optim import kernels
from stacey_dist.optim.group_settings import state_dtype
from stacey_dist.optim.kernels import Call, Kernel, NoKernelError, Row
from stacey_dist.optim.memory import defect, is_cut_short, is_simple, local, readable
from stacey_dist.optim.registry import support_in_deepspeed

# Elements updated at a time: temporaries that stay in a CPU core's cache, or that fill a GPU.
CPU_CHUNK_PER_THREAD = 1 << 16
DEVICE_CHUNK = 1 << 22

# A parameter, and this rank's part of it and of its gradient.
Part = tuple[Tensor, Tensor, Tensor]
# Updates one chunk in place: (weight, gradient, *state tensors).
ChunkUpdate = Callable[..., None]


class ElementwiseOptimizer(Optimizer):
    """An optimizer whose update of an element depends on that element alone.

    State of a parameter: `step`, the number of updates, an int64 scalar on the CPU (on the parameter's device if the
    group is `capturable`; torch's own optimizers have a float32, which stops at 2^24), and the tensors named in
    `state_names`, shaped and placed as the parameter (DTensors for a DTensor).

    As with torch's fused optimizers, `step` looks at two attributes that may be set before it is called, by
    `torch.amp.GradScaler` if `fused=True`: `grad_scale`, a one-element tensor by whose reciprocal, rounded to float32,
    gradients are multiplied on the way (they themselves are not changed); and `found_inf`, one that makes the step
    change nothing where it is not 0. `scaled_gradients` sets the first for the steps within it.

    In the step that creates a parameter's state, if `lr` is 0, an element with a zero gradient stays exactly as it is
    and the step is not counted. `torch.distributed.checkpoint` takes such a step to make an optimizer create its
    state; it must change nothing.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        support_in_deepspeed(type(self))
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a setting that is out of range; put settings into their canonical form."""
        raise NotImplementedError

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors named in `state_names` for a parameter that has no state yet."""
        return {}

    def _prepare(self, group: dict[str, Any], step: int, dtype: torch.dtype) -> ChunkUpdate:
        """The update of one chunk, for arithmetic in `dtype` (float32 or float64), as update number `step`.

        Its gradients are in `dtype` already.
        """
        raise NotImplementedError

    def _kernel_call(self, group: dict[str, Any]) -> Call | None:
        """What a kernel has to know of a group; None if there is none for this optimizer, or none is wanted."""
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
                if reason := defect(local(param)):
                    raise ValueError(f"{type(self).__name__}: a parameter cannot be updated: {reason}")
        except Exception:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, in place. Returns what `closure` returns, if given.

        Raises RuntimeError for sparse gradients, for a gradient laid out over ranks unlike its parameter, and for a
        parameter or gradient whose memory is shared between its elements or was freed. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All are checked before anything is changed.
        work = [(group, self._parts_to_update(group)) for group in self.param_groups]
        found_inf = getattr(self, "found_inf", None)
        capturable = [
            group for group in self.param_groups if group.get("capturable")
        ]  # their kernel looks at it itself
        if found_inf is not None and len(capturable) < len(work) and bool(found_inf):
            work = [(group, parts) for group, parts in work if group.get("capturable")]
        for group, parts in work:
            self._update_group(group, parts)
        return loss

    def _parts_to_update(self, group: dict[str, Any]) -> list[Part]:
        """Return this rank's parts of the parameters that have a gradient. Raises what `step` does."""
        parts: list[Part] = []
        for param in group["params"]:
            gradient = param.grad
            if gradient is None:
                continue
            if is_simple(param) and is_simple(gradient):
                weight = param
            else:
                self._check_gradient(param)
                weight, gradient = local(param), readable(local(gradient))
            if group.get("fused") and (reason := kernels.refusal((weight, gradient))) is not None:
                raise RuntimeError(f"{type(self).__name__}: fused=True, but {reason}")
            parts.append((param, weight, gradient))
        return parts

    def _update_group(self, group: dict[str, Any], parts: list[Part]) -> None:
        call = self._kernel_call(group)
        dtype_of_states = state_dtype(group) if self.state_names else None
        launches: dict[Any, tuple[Kernel | None, list[Row]]] = {}
        updates: dict[tuple[int, torch.dtype], ChunkUpdate] = {}
        for param, weight, gradient in parts:
            state = self.state[param]
            held = not state and float(group["lr"]) == 0.0
            if not state:
                state["step"] = _step_count(0, param, group)
                state.update(self._init_state(param, group))
            _check_step(state, param, group)
            for name in self.state_names:  # an engine's own loader may have made them float32
                if state[name].dtype != dtype_of_states:
                    state[name] = state[name].to(dtype_of_states)
            if call is not None and not held:
                row = Row(weight, gradient, local(state["z"]), local(state["m"]), state["step"])
                kind = kernels.kind(row)
                if kind is not None:
                    if kind not in launches:
                        launches[kind] = (kernel(weight.device.type), [])
                    found, rows = launches[kind]
                    if found is not None:
                        rows.append(row)
                        continue
            if not held:
                state["step"] += 1
            key = (int(state["step"]), torch.float64 if param.dtype == torch.float64 else torch.float32)
            if key not in updates:
                updates[key] = self._prepare(group, *key)
            self._update_plainly(param, updates[key], key[1], held)
        for found, rows in launches.values():
            if found is not None and call is not None:
                found(rows, call)

    def _update_plainly(self, param: Tensor, update: ChunkUpdate, dtype: torch.dtype, held: bool) -> None:
        """By the plain rule; `held` if the step is to make state alone."""
        scale = self._inverse_scale()
        states = (self.state[param][name] for name in self.state_names)
        assert param.grad is not None
        tensors = [local(t).detach() for t in (param, param.grad, *states)]
        for weight, gradient, *parts in chunks(tensors):
            gradient = readable(gradient).to(dtype)
            if scale is not None:
                gradient = gradient * scale
            if held:
                _update_moving_elements(update, weight, gradient, parts)
            else:
                update(weight, gradient, *parts)

    def _inverse_scale(self) -> float | None:
        """What gradients are to be multiplied with, as torch's GradScaler has it; None for nothing."""
        scale = getattr(self, "grad_scale", None)
        return None if scale is None else float(scale.double().reciprocal().float())

    def _check_gradient(self, param: Tensor) -> None:
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
        if getattr(param, "placements", None) != getattr(gradient, "placements", None):
            raise RuntimeError(
                f"{type(self).__name__}: a gradient placed {getattr(gradient, 'placements', None)} does not fit "
                f"its parameter, placed {getattr(param, 'placements', None)}"
            )

    @contextmanager
    def scaled_gradients(self, divisor: Tensor) -> Iterator[None]:
        """Divide gradients by `divisor` in the steps made within this context. The gradients themselves do not change.

        With `norm / max_norm` for a divisor, gradients are clipped to `max_norm` in the pass that updates the weights.

        Args:
            divisor: a positive tensor of one element; gradients are multiplied by its reciprocal, rounded to float32.
        """
        self.grad_scale = divisor
        try:
            yield
        finally:
            vars(self).pop("grad_scale", None)  # `torch.amp.GradScaler` may have deleted it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict. z and m come back in the group's `state_dtype`.

        Raises ValueError if they have other shapes than the parameters, or are another optimizer's, or a setting is out
        of range; nothing is loaded then.

        torch's own loading casts every state to its parameter's dtype, which would turn bfloat16 states into
        float32 ones, and float32 states of bfloat16 parameters into rounded ones. So it gets to see the step alone.
        """
        loaded: list[dict[str, Any]] = []

        def without_tensors(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            self._check_shapes(final)
            # What an older version, or another optimizer, does not have is as in the constructor.
            final = {**final, "param_groups": [{**self.defaults, **group} for group in final["param_groups"]]}
            for group, saved in zip(self.param_groups, final["param_groups"], strict=False):
                self._check_group({**saved, "params": group["params"]})
            loaded.append(final)
            kept = {
                key: {name: value for name, value in state.items() if name not in self.state_names}
                for key, state in final["state"].items()
            }
            return {**final, "state": kept}

        # The last pre-hook sees the state dict as a user's own hooks have left it; the first post-hook completes
        # the state before they look at it.
        before = self.register_load_state_dict_pre_hook(without_tensors)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore_states(loaded[-1]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, saved_id in zip(group["params"], saved_group["params"], strict=False):
                state = state_dict["state"].get(saved_id, {})
                if missing := [name for name in self.state_names if state and name not in state]:
                    what = f"{', '.join(state)} and no {' and '.join(missing)}"
                    raise ValueError(f"the state of parameter {saved_id} has {what}: it is another optimizer's")
                for name, value in state.items():
                    if name not in self.state_names:
                        continue
                    if value.layout is not torch.strided or value.is_nested or not value.is_floating_point():
                        what = f"state {name} of parameter {saved_id}"
                        raise ValueError(f"{what} is not a dense tensor of floating point numbers")
                    if value.shape != param.shape:
                        shapes = f"{tuple(value.shape)}, and its parameter {tuple(param.shape)}"
                        raise ValueError(f"state {name} of parameter {saved_id} has the shape {shapes}")

    def _restore_states(self, state_dict: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            self._check_group(group)  # a state dict that went through JSON has lists and strings
            for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(saved_id, {})
                for name in self.state_names:
                    if name in saved:
                        value = saved[name].to(param.device, state_dtype(group))
                        # Kernels want one order of elements in memory, and in it the value.
                        if value.stride() != param.stride() or readable(value) is not value:
                            value = torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
                        self.state[param][name] = value
                if "step" in saved:
                    self.state[param]["step"] = _step_count(int(saved["step"]), param, group)


def _step_count(value: int, param: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a parameter's count of updates, on the device where its group keeps it."""
    return torch.full((), value, dtype=torch.int64, device=param.device if group.get("capturable") else "cpu")


def _check_step(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Make the count of updates what kernels take; an engine's own loader may have made it a number or a float32."""
    step = state["step"]
    if not isinstance(step, Tensor) or step.dtype is not torch.int64 or step.is_cuda != bool(group.get("capturable")):
        state["step"] = _step_count(int(step), param, group)


@functools.cache
def kernel(device_type: str) -> Kernel | None:
    """The kernel for a type of device; None, after a warning that says why, if there is none."""
    try:
        return kernels.find(device_type)
    except NoKernelError as error:
        warnings.warn(f"stacey_dist runs its plain rule, which is slower: {error}", stacklevel=2)
        return None


def chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape into views of at most a chunk's elements, all in the same way.

    The rule is element-wise, so any cut gives the same result. Tensors that cannot be viewed as flat are halved
    along their longest dimension.
    """
    first = tensors[0]
    on_cpu = first.device.type == "cpu"
    size = CPU_CHUNK_PER_THREAD * torch.get_num_threads() if on_cpu else DEVICE_CHUNK
    count = first.numel()
    if count == 0:
        return
    if count <= size:
        yield tensors
        return
    if on_cpu:
        _keep_freed_memory()
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        for start in range(0, count, size):
            yield [t[start : start + size] for t in flat]
    else:
        dim = max(range(first.dim()), key=first.size)
        half = first.size(dim) // 2
        yield from chunks([t.narrow(dim, 0, half) for t in tensors])
        yield from chunks([t.narrow(dim, half, t.size(dim) - half) for t in tensors])


@functools.cache
def _keep_freed_memory() -> None:
    """Have the C library keep what one chunk's temporaries free for the next chunk's.

    glibc gives free memory at the end of its heap back to the system, and a page fault for every 4 KiB of it that
    is needed again takes more time than the arithmetic. The largest mapped block that was ever freed, up to
    32 MiB, sets how much it keeps (mallopt(3), M_MMAP_THRESHOLD). The block here is never touched.
    """
    torch.empty(28 << 20, dtype=torch.uint8)


def _update_moving_elements(update: ChunkUpdate, weight: Tensor, gradient: Tensor, states: list[Tensor]) -> None:
    """Update in place, but leave an element with a zero gradient as it is."""
    before = [t.clone() for t in (weight, *states)]
    update(weight, gradient, *states)
    for tensor, old in zip((weight, *states), before, strict=True):
        tensor.copy_(torch.where(gradient == 0, old, tensor))
