"""The update rule of rule.py, power.py and rounding.py in Triton: the same operations, hence the same bits.

Names and comment lines are those of the Python files and of cpu.cpp, to be read side by side. Divisions and roots are
the correctly rounded ones, and nothing is contracted to fused multiply-adds. bfloat16 travels as its 16 bits.

One launch updates all rows: it finds their tensors through a table of pointers, in which each program looks up which
block of which row is its own. What changes from step to step (step counts, and with `capturable` learning rate, loss
scale and overflow) is read on the device, so that a CUDA graph of the launch can be replayed.
"""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stacey_dist.optim.following import follow
from stacey_dist.optim.kernels import Call, NoKernelError, Row
from stacey_dist.optim.kernels.constants import ONE, ROOT, SAME, VARIANTS, float_constants, power_kind
from stacey_dist.optim.rounding import STATES, WEIGHT, key_base
from stacey_dist.optim.rule import log2_in_parts

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise NoKernelError(f"the kernel for GPUs needs triton, which can't be imported: {error}") from error

BLOCK = 1024
_COLUMNS = 6  # weight, gradient, z, m, step, size
_MOST_TABLES = 1000

_ONE: Any = tl.constexpr(ONE)
_ROOT: Any = tl.constexpr(ROOT)
_SAME: Any = tl.constexpr(SAME)
_P2: Any = tl.constexpr(VARIANTS.index("p2"))
_TWO_P: Any = tl.constexpr(VARIANTS.index("2p"))
_ZERO_EXPONENT: Any = tl.constexpr(-(2.0**20))
_SIGN: Any = tl.constexpr(-(2**31))


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _upper(bits):
    return (bits >> 16) & 0xFFFF


@triton.jit
def _log2_parts(x):
    """Base-2 logarithm of x >= 0 as (whole, fraction); zero gets a whole of ZERO_EXPONENT."""
    # Subnormal numbers are scaled up by 2^24 (times 1.0 otherwise) to have a full mantissa.
    subnormal = (_bits(x) - 0x00800000) >> 31
    scale = _number((subnormal & (24 << 23)) + (127 << 23))
    normal_bits = _bits(scale * x)
    exponent = normal_bits - 0x3F400000
    mantissa = _number(normal_bits - (exponent & -0x00800000))
    whole = ((exponent >> 23) - (subnormal & 24)).to(tl.float32)
    whole = tl.where(x != 0.0, whole, _ZERO_EXPONENT)
    # log2(m) = s (a0 + s^2 (a1 + s^2 a2)), s = (m - 1) / (m + 1)
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    square = s * s
    fraction = ((square * 0.6027452945709229 + 0.9614068269729614) * square + 2.8853909969329834) * s
    return whole, fraction


@triton.jit
def _exp2_sum(high, low):
    """2^(high + low), high exact and low small beside it; 0 below the range, infinity above it."""
    # k = round(high + low), t = (high - k) + low in [-1/2, 1/2]
    k = high + low
    k = tl.where(k < -250.0, -250.0, k)
    k = tl.where(k > 250.0, 250.0, k)
    k = (k + 12582912.0) - 12582912.0  # 1.5 * 2^23
    t = (high - k) + low
    t = tl.where(t < -1.0, -1.0, t)  # matters only where k was clamped
    t = tl.where(t > 1.0, 1.0, t)
    # 2^t = 1 + t (b1 + t (b2 + t (b3 + t (b4 + t b5))))
    result = t * 0.001326472731307149 + 0.009671512991189957
    result = result * t + 0.05550733581185341
    result = result * t + 0.24022242426872253
    result = result * t + 0.6931470036506653
    result = result * t + 1.0
    # 2^k as a product of two powers, the first of which is exact, since k alone may lie outside the exponents.
    whole = k.to(tl.int32)
    half = whole >> 1
    return result * _number((half + 127) << 23) * _number((whole - half + 127) << 23)


@triton.jit
def _interpolate(m, g, beta, rest):
    """beta m + (1 - beta) g, from the nearer end."""
    if beta >= 0.5:
        result = (g - m) * rest + m
    else:
        result = (m - g) * beta + g
    return result


@triton.jit
def _mirror_step(
    z, c, c_whole, c_fraction, log_alpha_whole, log_alpha_fraction,
    inner_high, inner_low, inner, root_high, root_low, root,
):  # fmt: skip
    """The dual step of (p,p) and (2,p): see rule.py."""
    z_whole, z_fraction = _log2_parts(tl.abs(z))
    c_whole += log_alpha_whole
    c_fraction += log_alpha_fraction
    # gap = log2(|z|^(p-1)) - log2(alpha |c|);  |t| = 2^-|gap|
    gap_high = z_whole * inner_high - c_whole
    gap_low = (z_whole * inner_low + z_fraction * inner) - c_fraction
    c_larger = gap_high + gap_low < 0.0
    t = _exp2_sum(tl.where(c_larger, gap_high, -gap_high), tl.where(c_larger, gap_low, -gap_low))
    # The two terms of u are z's and -c's; t is negative where they oppose each other.
    t = _number(_bits(t) | ((_bits(z) ^ _bits(c) ^ -1) & _SIGN))
    # |z'| = larger^r (1 + t)^r = [|z| or 1] * 2^(r log2(1 + t) + [0 or r log2(alpha |c|)])
    whole, fraction = _log2_parts(t + 1.0)
    whole = tl.where(c_larger, whole + c_whole, whole)
    fraction = tl.where(c_larger, fraction + c_fraction, fraction)
    growth = _exp2_sum(whole * root_high, whole * root_low + fraction * root)
    size = growth * tl.where(c_larger, 1.0, tl.abs(z))
    sign = tl.where(c_larger, (_bits(c) ^ -1) & _SIGN, _bits(z) & _SIGN)
    return _number(_bits(size) ^ sign) + (z - z) + (c - c)


@triton.jit
def _round_key(base, step):
    """rounding.round_key from its `key_base` and the step count."""
    x = base.to(tl.uint64, bitcast=True) + step.to(tl.uint64) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _random_bits(first, second, key):
    """Twice 16 random bits an element: a hash of two numbers of it and a key; 0 where their sum is NaN."""
    # The second is turned by 16 bits, so that bits that seldom change meet bits that do.
    turned = (_bits(second) << 16) | _upper(_bits(second))
    h = (turned ^ _bits(first) ^ key) * -1640531535  # 0x9E3779B1
    total = first + second
    high = _upper(h)
    return tl.where(total == total, high, 0), tl.where(total == total, (h ^ high) & 0xFFFF, 0)


@triton.jit
def _round_nearest(value):
    bits = _bits(value)
    return tl.where(value == value, bits + (((bits >> 16) & 1) + 0x7FFF), 0x7FC00000)


@triton.jit
def _pointers(address, index, NARROW: tl.constexpr, ALIGNED: tl.constexpr):
    """To the block's elements in a tensor, with what Triton can't see and needs for accesses of 16 bytes."""
    if NARROW:
        pointers = address.to(tl.pointer_type(tl.int16)) + index
    else:
        pointers = address.to(tl.pointer_type(tl.float32)) + index
    if ALIGNED:
        pointers = tl.multiple_of(tl.max_contiguous(pointers, index.shape[0]), 16)
    return pointers


@triton.jit
def _load(pointers, mask, NARROW: tl.constexpr):
    if NARROW:
        value = _number(tl.load(pointers, mask=mask, other=0).to(tl.int32) << 16)
    else:
        value = tl.load(pointers, mask=mask, other=0.0)
    return value


@triton.jit
def _store_upper(pointers, mask, bits):
    tl.store(pointers, (bits >> 16).to(tl.int16), mask=mask)


@triton.jit
def _stacey_step(
    table, block_rows, block_numbers, rates, scale, found_inf,
    primal_rate, pull, alpha, tau, beta1, beta1_rest, beta2, beta2_rest, eps,
    exponent_high, exponent_low, exponent, inner_high, inner_low, inner, root_high, root_low, root,
    log_alpha_whole, log_alpha_fraction,
    VARIANT: tl.constexpr, POWER: tl.constexpr, MIRROR_IS_PLAIN: tl.constexpr, ALPHA_IS_ZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr, WEIGHT_IS_NARROW: tl.constexpr, GRADIENT_IS_NARROW: tl.constexpr,
    STATE_IS_NARROW: tl.constexpr, LR_ON_DEVICE: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One step of STACEY(p,2), (p,p) or (2,p), algorithms 2, 3 and 4, for one block of one row."""
    row = table + 2 + tl.load(block_rows + tl.program_id(0)) * COLUMNS
    index = tl.load(block_numbers + tl.program_id(0)) * SIZE + tl.arange(0, SIZE)
    weight = _pointers(tl.load(row), index, WEIGHT_IS_NARROW, ALIGNED)
    gradient = _pointers(tl.load(row + 1), index, GRADIENT_IS_NARROW, ALIGNED)
    z_pointers = _pointers(tl.load(row + 2), index, STATE_IS_NARROW, ALIGNED)
    m_pointers = _pointers(tl.load(row + 3), index, STATE_IS_NARROW, ALIGNED)
    step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.int64)))
    mask = index < tl.load(row + 5)
    if ALIGNED:
        mask = tl.max_constancy(mask, 8)
    if HAS_FOUND_INF:
        mask = tl.where(tl.load(found_inf) == 0.0, mask, False)
    if LR_ON_DEVICE:  # (1 - tau) lr and tau + lr lambda, as Python works them out
        lr = tl.load(rates)
        primal_rate = (tl.load(rates + 1) * lr).to(tl.float32)
        pull = (tl.load(rates + 2) + lr * tl.load(rates + 3)).to(tl.float32)
        tau = tl.load(rates + 2).to(tl.float32)
        alpha = tl.load(rates + 4).to(tl.float32)
        log_alpha_whole = tl.load(rates + 5).to(tl.float32)
        log_alpha_fraction = tl.load(rates + 6).to(tl.float32)
    g = _load(gradient, mask, GRADIENT_IS_NARROW)
    if HAS_SCALE:
        g = g * tl.load(scale)
    z = _load(z_pointers, mask, STATE_IS_NARROW)
    m = _load(m_pointers, mask, STATE_IS_NARROW)
    theta = _load(weight, mask, WEIGHT_IS_NARROW)

    # c = beta1 m + (1 - beta1) g        m' = beta2 m + (1 - beta2) g
    c = _interpolate(m, g, beta1, beta1_rest)
    m_new = _interpolate(m, g, beta2, beta2_rest)
    size = tl.abs(c)
    c_whole, c_fraction = _log2_parts(size)

    # dual step     z' = z - alpha c        or, for (p,p) and (2,p), the mirror step
    if VARIANT == _P2 or MIRROR_IS_PLAIN:
        z_new = z - c * alpha
    elif ALPHA_IS_ZERO:
        z_new = z + c * 0.0
    else:
        z_new = _mirror_step(
            z, c, c_whole, c_fraction, log_alpha_whole, log_alpha_fraction,
            inner_high, inner_low, inner, root_high, root_low, root,
        )  # fmt: skip
        if LR_ON_DEVICE:  # alpha is 0 where it follows a learning rate of 0
            z_new = tl.where(tl.load(rates + 4) == 0.0, z + c * 0.0, z_new)

    # primal step   eta s(c)    or, for (2,p),    eta c;    s(x) = x / (|x|^((p-2)/(p-1)) + eps), and s(0) = 0
    if VARIANT == _TWO_P:
        direction = c
    else:
        if POWER == _ONE:
            power = tl.full([SIZE], 1.0, tl.float32)
        elif POWER == _ROOT:
            power = tl.sqrt_rn(size)
        elif POWER == _SAME:
            power = size
        else:
            power = _exp2_sum(c_whole * exponent_high, c_whole * exponent_low + c_fraction * exponent) + (c - c)
        # 0 over any positive number is 0.
        direction = tl.div_rn(c, tl.where(c != 0.0, power + eps, 1.0))

    # coupling      theta' = theta + [tau z' - (tau + eta lambda) theta - (1 - tau) eta s]
    theta_new = ((z_new * tau - theta * pull) - direction * primal_rate) + theta

    if STATE_IS_NARROW:
        if STOCHASTIC:
            for_z, for_m = _random_bits(z_new, m_new, _round_key(tl.load(table), step))
            _store_upper(z_pointers, mask, _bits(z_new) + for_z)
            _store_upper(m_pointers, mask, _bits(m_new) + for_m)
        else:
            _store_upper(z_pointers, mask, _round_nearest(z_new))
            _store_upper(m_pointers, mask, _round_nearest(m_new))
    else:
        tl.store(z_pointers, z_new, mask=mask)
        tl.store(m_pointers, m_new, mask=mask)
    if WEIGHT_IS_NARROW:
        if STOCHASTIC:
            for_weight, _ = _random_bits(theta_new, g, _round_key(tl.load(table + 1), step))
            _store_upper(weight, mask, _bits(theta_new) + for_weight)
        else:
            _store_upper(weight, mask, _round_nearest(theta_new))
    else:
        tl.store(weight, theta_new, mask=mask)


@dataclass
class _Tables:
    """What launches on the same tensors read on their device."""

    key: list[Any]
    rows: Tensor
    """Two key bases for the hashes, then `_COLUMNS` numbers for each row."""
    block_rows: Tensor
    block_numbers: Tensor
    steps: Tensor
    """The step counts of this launch, where those of the rows are in host memory."""
    aligned: bool
    """All addresses are multiples of 16 bytes, and all sizes of 8 elements."""


class TritonKernel:
    """One launch for all rows; the tables of each parameter group serve again while its pointers stay."""

    name = "Triton"

    def __init__(self) -> None:
        # By device and the address of the first weight, which tells groups apart.
        self._tables: dict[tuple[torch.device, int], _Tables] = {}
        # A captured graph copies its tables from host memory at each replay.
        self._captured: list[Any] = []

    def __call__(self, rows: list[Row], call: Call) -> None:
        """See `Kernel`."""
        device = rows[0].weight.device
        # Triton launches on the current GPU, which need not be the one that the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._launch(rows, call)

    def _launch(self, rows: list[Row], call: Call) -> None:
        s, first = call.settings, rows[0]
        steps = [row.step for row in rows]
        if call.capturable:
            applied: Any = 1 if call.found_inf is None else (call.found_inf == 0).reshape(()).to(torch.int64)
            torch._foreach_add_(steps, applied)
        else:
            torch._foreach_add_(steps, 1)
        tables = self._find_tables(rows, call)
        if not call.capturable:
            tables.steps.copy_(_pinned(torch.stack(steps), tables.steps.device), non_blocking=True)
        unused = tables.steps
        rates = unused if call.lr is None else self._rates(call, tables.rows.device)
        scale = unused if call.grad_scale is None else call.grad_scale.double().reciprocal().float()
        _stacey_step[(len(tables.block_rows),)](
            tables.rows, tables.block_rows, tables.block_numbers, rates, scale,
            unused if call.found_inf is None else call.found_inf,
            *float_constants(s).values(),
            VARIANT=VARIANTS.index(s.variant), POWER=power_kind(s), MIRROR_IS_PLAIN=s.p == 2.0,
            ALPHA_IS_ZERO=s.alpha == 0.0, STOCHASTIC=call.stochastic,
            WEIGHT_IS_NARROW=first.weight.dtype == torch.bfloat16,
            GRADIENT_IS_NARROW=first.gradient.dtype == torch.bfloat16,
            STATE_IS_NARROW=first.z.dtype == torch.bfloat16,
            LR_ON_DEVICE=call.lr is not None, HAS_SCALE=call.grad_scale is not None,
            HAS_FOUND_INF=call.found_inf is not None, ALIGNED=tables.aligned, COLUMNS=_COLUMNS, SIZE=BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        torch.autograd.graph.increment_version([row.weight for row in rows])  # as torch's operations in place do

    def _rates(self, call: Call, device: torch.device) -> Tensor:
        """On the device, in float64: lr, which must be there, 1 - tau, tau, lambda, alpha and log2(alpha) in parts."""
        s = call.settings
        assert call.lr is not None
        lr = call.lr.detach().reshape(1).float().double()
        numbers = [1.0 - s.tau, s.tau, s.weight_decay, s.alpha, *log2_in_parts(s.alpha)]
        host = _pinned(torch.tensor(numbers, dtype=torch.float64, device="cpu"), device)
        if _is_capturing(device):
            self._captured.append(host)
        rest = host.to(device, non_blocking=True)
        if call.lr_reference is not None:
            alpha, tau, *log2_alpha = follow(lr, call.lr_reference, s.alpha, s.tau, torch.float32).split(1)
            rest = torch.cat([1.0 - tau, tau, rest[2:3], alpha, *log2_alpha])
        return torch.cat([lr, rest])

    def _find_tables(self, rows: list[Row], call: Call) -> _Tables:
        device = rows[0].weight.device
        key: list[Any] = [call.seed, call.capturable]
        for weight, gradient, z, m, step in rows:
            key += [weight.data_ptr(), gradient.data_ptr(), z.data_ptr(), m.data_ptr(), weight.numel()]
            key += [step.data_ptr()] * call.capturable
        group = device, next((row.weight.data_ptr() for row in rows if row.weight.numel() > 0), 0)
        found = self._tables.get(group)
        capturing = _is_capturing(device)
        if found is None or found.key != key:
            found = self._make_tables(rows, call, key, device)
            if not capturing:  # a graph's are its own: nothing is in them before a replay
                self._tables.pop(group, None)
                if len(self._tables) >= _MOST_TABLES:  # of groups that have gone: the oldest first
                    self._tables.pop(next(iter(self._tables)))
                self._tables[group] = found
        if capturing:  # replays read them, whoever launches next
            self._captured.append(found)
        return found

    def _make_tables(self, rows: list[Row], call: Call, key: list[Any], device: torch.device) -> _Tables:
        steps = torch.empty(len(rows), dtype=torch.int64, device=device)
        numbers = [key_base(call.seed, STATES), key_base(call.seed, WEIGHT)]
        block_rows: list[int] = []
        block_numbers: list[int] = []
        for i, (weight, gradient, z, m, step) in enumerate(rows):
            at = step.data_ptr() if call.capturable else steps.data_ptr() + 8 * i
            numbers += [weight.data_ptr(), gradient.data_ptr(), z.data_ptr(), m.data_ptr(), at, weight.numel()]
            blocks = range(-(-weight.numel() // BLOCK))
            block_numbers += blocks
            block_rows += [i] * len(blocks)
        aligned = all(
            row.weight.numel() % 8 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in row[:4]) for row in rows
        )
        host = [
            torch.tensor(numbers, dtype=torch.int64, device="cpu"),
            torch.tensor(block_rows, dtype=torch.int32, device="cpu"),
            torch.tensor(block_numbers, dtype=torch.int64, device="cpu"),
        ]
        host = [_pinned(tensor, device) for tensor in host]
        there = [tensor.to(device, non_blocking=True) for tensor in host]
        if _is_capturing(device):
            self._captured.append(host)
        return _Tables(key, there[0], there[1], there[2], steps, aligned)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


@functools.cache
def find() -> TritonKernel:
    """The kernel for GPUs."""
    return TritonKernel()
