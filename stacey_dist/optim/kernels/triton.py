"""The update rule of rule.py, power.py and rounding.py in Triton: the same operations, hence the same bits.

Names and comment lines are those of the Python files and of cpu.cpp, to be read side by side. Divisions and roots are
the correctly rounded ones, and multiply-adds are fused where `tl.fma` stands, and nowhere else. bfloat16 travels as its
16 bits.

One launch updates all rows: it finds their tensors through a table of pointers. Two more tables say which entry of
which row a program takes a block of. What changes from step to step (step counts, and with `capturable` learning rate,
loss scale and overflow) is read on the device, so that a CUDA graph of the launch can be replayed.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stacey_dist.errors import one_line
from stacey_dist.optim.kernels import Call, NoKernelError, Row, apart, is_capturing
from stacey_dist.optim.kernels.constants import ONE, ROOT, SAME, VARIANTS, float_constants, power_kind
from stacey_dist.optim.power import EXP2, LOG2, LOG2_NEAR_ONE, MAGIC, ZERO_EXPONENT
from stacey_dist.optim.rounding import STATES, WEIGHT, key_base
from stacey_dist.optim.rule import HALF, StaceySettings, log2_in_parts, scale_with_lr

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise NoKernelError(f"the kernel for GPUs needs triton, which can't be imported: {error}") from error

BLOCK, WARPS = 1024, 4
_SHIFT = 6
"""The logarithm of the most blocks that an entry has: 65 536 elements, as in torch's kernels for many tensors."""
_EMPTY = 1 / 16
"""The largest share of programs that may have nothing to do, because the last entries of rows are short."""

_HEADER = 4
"""What a table begins with: two key bases for hashes, the number of rows, the logarithm of the blocks of an entry."""
_COUNTS, _GRADIENT, _WEIGHT, _Z, _M, _STEP, _SIZE = range(7)
"""A table's columns: step counts that the host sends, addresses, sizes. What changes most often comes first."""
_MOST_TABLES = 1000

_ONE: Any = tl.constexpr(ONE)
_ROOT: Any = tl.constexpr(ROOT)
_SAME: Any = tl.constexpr(SAME)
_P2: Any = tl.constexpr(VARIANTS.index("p2"))
_TWO_P: Any = tl.constexpr(VARIANTS.index("2p"))
_ZERO_EXPONENT: Any = tl.constexpr(ZERO_EXPONENT)
_MAGIC: Any = tl.constexpr(MAGIC)
_MAGIC_BITS: Any = tl.constexpr(0x4B400000)
_LOG2_0, _LOG2_1, _LOG2_2, _LOG2_3, _LOG2_4, _LOG2_5, _LOG2_6, _LOG2_7 = map(tl.constexpr, LOG2)
_NEAR_ONE_0, _NEAR_ONE_1, _NEAR_ONE_2, _NEAR_ONE_3, _NEAR_ONE_4, _NEAR_ONE_5, _NEAR_ONE_6 = map(
    tl.constexpr, LOG2_NEAR_ONE
)
_EXP2_0, _EXP2_1, _EXP2_2, _EXP2_3, _EXP2_4 = map(tl.constexpr, EXP2)
_SIGN: Any = tl.constexpr(-(2**31))
_AT_HEADER: Any = tl.constexpr(_HEADER)


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
    """Return the base-2 logarithm of x > 0 as (whole, fraction)."""
    # Subnormal numbers are scaled up by 2^24 to have a full mantissa.
    small = x < 1.1754943508222875e-38
    bits = _bits(tl.where(small, x * 16777216.0, x))
    # Below 2^23, an integer is a float32 from the bits of 2^23 on.
    whole = _number((bits >> 23) + 0x4B000000) - tl.where(small, 8388608.0 + 127.0 + 24.0, 8388608.0 + 127.0)
    r = _number((bits & 0x007FFFFF) | 0x3F800000) - 1.0
    # log2(1 + r) = r (a0 + r (a1 + ...))
    result = tl.fma(r, _LOG2_7, _LOG2_6)
    result = tl.fma(result, r, _LOG2_5)
    result = tl.fma(result, r, _LOG2_4)
    result = tl.fma(result, r, _LOG2_3)
    result = tl.fma(result, r, _LOG2_2)
    result = tl.fma(result, r, _LOG2_1)
    result = tl.fma(result, r, _LOG2_0)
    return whole, result * r


@triton.jit
def _log2_near_one(x):
    """Return the base-2 logarithm of a normal x as (whole, fraction), exact to a relative error also near x = 1."""
    exponent = _bits(x) - 0x3F400000
    r = _number(_bits(x) - (exponent & -0x00800000)) - 1.0  # mantissas are in [3/4, 3/2)
    # `exponent >> 23` as a float32, from the bits of 1.5 * 2^23 on
    whole = tl.where(x == 0.0, _ZERO_EXPONENT, _number((exponent >> 23) + _MAGIC_BITS) - _MAGIC)
    result = tl.fma(r, _NEAR_ONE_6, _NEAR_ONE_5)
    result = tl.fma(result, r, _NEAR_ONE_4)
    result = tl.fma(result, r, _NEAR_ONE_3)
    result = tl.fma(result, r, _NEAR_ONE_2)
    result = tl.fma(result, r, _NEAR_ONE_1)
    result = tl.fma(result, r, _NEAR_ONE_0)
    return whole, result * r


@triton.jit
def _exp2_less_one(t):
    """Return 2^t - 1 = t (b0 + t (b1 + ...)), without the outer product with t."""
    result = tl.fma(t, _EXP2_4, _EXP2_3)
    result = tl.fma(result, t, _EXP2_2)
    result = tl.fma(result, t, _EXP2_1)
    return tl.fma(result, t, _EXP2_0)


@triton.jit
def _product_less(whole, fraction, high, low, factor, k):
    """Return factor (whole + fraction) - k, a small difference of large terms, with about one rounding error."""
    return tl.fma(fraction, factor, tl.fma(whole, low, tl.fma(whole, high, -k)))


@triton.jit
def _product_parts(whole, fraction, high, low, factor):
    """Return factor (whole + fraction) as an integer and the rest; the integer as bits from those of MAGIC on."""
    k = tl.fma(whole + fraction, factor, _MAGIC)
    return _bits(k), _product_less(whole, fraction, high, low, factor, k - _MAGIC)


@triton.jit
def _power(whole, fraction, high, low, factor):
    """Return 2^(factor (whole + fraction)), rounded once where it is subnormal; for float32 and a factor < 1."""
    k, t = _product_parts(whole, fraction, high, low, factor)
    # 2^k as a product of two powers, the first of which is exact, since k alone may lie outside the exponents. k still
    # contains MAGIC's bits. They, and half of them, end in so many zeros that the shift by 23 discards them.
    half = k >> 1
    first = _bits(tl.fma(_exp2_less_one(t), t, 1.0)) + (half << 23)
    return _number(first) * _number(((k - half) << 23) + 0x3F800000)


@triton.jit
def _exp2_times(x, k, t):
    """Return x 2^(k + t), nearer to the true value the nearer the power is to one; k as in _product_parts."""
    k = tl.maximum(k, _MAGIC_BITS - 250)
    half = k >> 1
    scaled = _number((half << 23) + 0x3F800000) * _number(((k - half) << 23) + 0x3F800000) * x
    return tl.fma(scaled, _exp2_less_one(t) * t, scaled)


@triton.jit
def _interpolate(m, g, beta, rest, NEARER_M: tl.constexpr):
    """Return beta m + (1 - beta) g, from the nearer end."""
    if NEARER_M:
        result = tl.fma(g - m, rest, m)
    else:
        result = tl.fma(g - m, -beta, g)
    return result


@triton.jit
def _mirror_step(
    z, c, c_whole, c_fraction, log_alpha_whole, log_alpha_fraction,
    inner_high, inner_low, inner, root_high, root_low, root,
):  # fmt: skip
    """Return z after the dual step of (p,p) and (2,p): see rule.py."""
    z_whole, z_fraction = _log2_parts(tl.abs(z))
    z_whole = tl.where(z == 0.0, _ZERO_EXPONENT, z_whole)
    # log2(alpha |c|)
    c_whole = tl.where(c == 0.0, _ZERO_EXPONENT, c_whole + log_alpha_whole)
    c_fraction += log_alpha_fraction
    # gap = log2(|z|^(p-1)) - log2(alpha |c|) = k + t
    gap = tl.fma(z_whole + z_fraction, inner, -(c_whole + c_fraction))
    k = (gap + _MAGIC) - _MAGIC
    t = _product_less(z_whole, z_fraction, inner_high, inner_low, inner, k + c_whole) - c_fraction
    # The smaller term of u over the larger one is 2^-|gap|; below 2^-25 it does not change 1 + ratio. The terms are z's
    # and -c's; the ratio is negative where they oppose each other.
    c_larger = gap < 0.0
    t = tl.where(c_larger, t, -t)
    k = tl.maximum(-tl.abs(k), -100.0) + _MAGIC
    ratio = _bits(tl.fma(_exp2_less_one(t), t, 1.0)) + (_bits(k) << 23)
    ratio = _number(ratio | ((_bits(z) ^ _bits(c) ^ -1) & _SIGN))
    # z' = [z or -sign(c)] 2^(r (log2(1 + ratio) + [0 or log2(alpha |c|)]))
    whole, fraction = _log2_near_one(ratio + 1.0)
    whole = tl.where(c_larger, whole + c_whole, whole)
    fraction = tl.where(c_larger, fraction + c_fraction, fraction)
    start = tl.where(c_larger, _number(((_bits(c) ^ -1) & _SIGN) | 0x3F800000), z)
    k, t = _product_parts(whole, fraction, root_high, root_low, root)
    return tl.fma(z, 0.0, _exp2_times(start, k, t)) + (c - c)


@triton.jit
def _round_key(base, step):
    """Return rounding.round_key from its `key_base` and the step count."""
    x = base.to(tl.uint64, bitcast=True) + step.to(tl.uint64) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _random_bits(first, second, key):
    """Return twice 16 random bits an element: a hash of two of its numbers and a key; 0 where one is NaN."""
    # The second is rotated by 16 bits, so that its rarely changing bits meet often changing bits of the first.
    turned = (_bits(second) << 16) | _upper(_bits(second))
    h = (turned ^ _bits(first) ^ key) * -1640531535  # 0x9E3779B1
    h = tl.where((first == first) & (second == second), h, 0)
    high = _upper(h)
    return high, (h ^ high) & 0xFFFF


@triton.jit
def _round_nearest(value):
    bits = _bits(value)
    return tl.where(value == value, bits + (((bits >> 16) & 1) + 0x7FFF), 0x7FC00000)


@triton.jit
def _pointers(address, index, NARROW: tl.constexpr, ALIGNED: tl.constexpr):
    """Return pointers to the block's elements, with what Triton can't see and needs for accesses of 16 bytes."""
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
        value = _number(tl.load(pointers, mask=mask).to(tl.int32) << 16)
    else:
        value = tl.load(pointers, mask=mask)
    return value


@triton.jit
def _store_upper(pointers, mask, bits):
    tl.store(pointers, (bits >> 16).to(tl.int16), mask=mask)


@triton.jit
def stacey_step(
    table, block_rows, block_numbers, rates, scale, found_inf,
    primal_rate, pull, alpha, tau, beta1, beta1_rest, beta2, beta2_rest, eps,
    exponent_high, exponent_low, exponent, inner_high, inner_low, inner, root_high, root_low, root,
    log_alpha_whole, log_alpha_fraction,
    VARIANT: tl.constexpr, POWER: tl.constexpr, MIRROR_IS_PLAIN: tl.constexpr, ALPHA_IS_ZERO: tl.constexpr,
    EPS_IS_ZERO: tl.constexpr,
    STOCHASTIC: tl.constexpr, WEIGHT_IS_NARROW: tl.constexpr, GRADIENT_IS_NARROW: tl.constexpr,
    STATE_IS_NARROW: tl.constexpr, BETA1_NEARER_M: tl.constexpr, BETA2_NEARER_M: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Make one step of STACEY(p,2), (p,p) or (2,p), algorithms 2, 3 and 4, for one block of an entry of one row."""
    rows = tl.load(table + 2).to(tl.int32)
    shift = tl.load(table + 3).to(tl.int32)
    entry = tl.program_id(0) >> shift
    row = table + _AT_HEADER + tl.load(block_rows + entry)
    block = (tl.load(block_numbers + entry) << shift) + (tl.program_id(0) - (entry << shift))
    index = block * SIZE + tl.arange(0, SIZE)
    # Column after column: an addition each, and no multiplication.
    at = row + rows
    gradient = _pointers(tl.load(at), index, GRADIENT_IS_NARROW, ALIGNED)
    at += rows
    weight = _pointers(tl.load(at), index, WEIGHT_IS_NARROW, ALIGNED)
    at += rows
    z_pointers = _pointers(tl.load(at), index, STATE_IS_NARROW, ALIGNED)
    at += rows
    m_pointers = _pointers(tl.load(at), index, STATE_IS_NARROW, ALIGNED)
    at += rows
    step = tl.load(tl.load(at).to(tl.pointer_type(tl.int64)))
    at += rows
    mask = index < tl.load(at)
    if ALIGNED:
        mask = tl.max_constancy(mask, 8)
    if HAS_FOUND_INF:
        mask = tl.where(tl.load(found_inf) == 0.0, mask, False)
    if LR_ON_DEVICE:  # (1 - tau) lr and tau + lr lambda, as Python computes them; `_rates` has the order of `rates`
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
    c = _interpolate(m, g, beta1, beta1_rest, BETA1_NEARER_M)
    m_new = _interpolate(m, g, beta2, beta2_rest, BETA2_NEARER_M)
    size = tl.abs(c)
    c_whole, c_fraction = _log2_parts(size)

    # dual step     z' = z - alpha c        or, for (p,p) and (2,p), the mirror step
    if VARIANT == _P2 or MIRROR_IS_PLAIN:
        z_new = tl.fma(c, -alpha, z)
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
            # size * 0 is 0, but NaN for infinity and NaN
            power = tl.fma(size, 0.0, _power(c_whole, c_fraction, exponent_high, exponent_low, exponent))
        power += eps
        # 0 over any positive number is 0.
        if EPS_IS_ZERO:
            power = tl.where(c != 0.0, power, 1.0)
        direction = tl.div_rn(c, power)

    # coupling      theta' = theta + [tau z' - (tau + eta lambda) theta - (1 - tau) eta s]
    theta_new = tl.fma(direction, -primal_rate, tl.fma(theta, -pull, z_new * tau)) + theta

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


def compile_time_values(
    s: StaceySettings,
    weight: torch.dtype,
    gradient: torch.dtype,
    state: torch.dtype,
    *,
    stochastic: bool = True,
    lr_on_device: bool = False,
    has_scale: bool = False,
    has_found_inf: bool = False,
    aligned: bool = True,
) -> dict[str, Any]:
    """Return the parameters of `stacey_step` that are constants in a compiled kernel."""
    return dict(
        VARIANT=VARIANTS.index(s.variant), POWER=power_kind(s), MIRROR_IS_PLAIN=s.p == 2.0,
        ALPHA_IS_ZERO=s.alpha == 0.0, EPS_IS_ZERO=s.eps <= 2.0**-150, STOCHASTIC=stochastic,
        WEIGHT_IS_NARROW=weight == torch.bfloat16, GRADIENT_IS_NARROW=gradient == torch.bfloat16,
        STATE_IS_NARROW=state == torch.bfloat16, BETA1_NEARER_M=s.beta1 >= HALF, BETA2_NEARER_M=s.beta2 >= HALF,
        LR_ON_DEVICE=lr_on_device, HAS_SCALE=has_scale, HAS_FOUND_INF=has_found_inf, ALIGNED=aligned,
        SIZE=BLOCK,
    )  # fmt: skip


@dataclass
class _Tables:
    """The tables that launches on tensors of the same sizes read on their device."""

    key: tuple[Any, ...]
    """Seed, whether the call is capturable, sizes: where they differ, other tables are made."""
    table: Tensor
    block_rows: Tensor
    """The row of each entry."""
    block_numbers: Tensor
    """The number of each entry in its row."""
    programs: int
    steps: list[int]
    """Where in `table` the step counts lie that the host sends."""
    columns: list[list[int]] = field(default_factory=lambda: [[]] * 7)
    """Of `table`, as they were sent."""
    bits: list[int] = field(default_factory=lambda: [0] * 7)
    """Those that are set in any number of a column."""
    counters: list[ctypes.c_int64] = field(default_factory=list)
    """The step counts of the rows, where these lie in host memory."""
    counted: list[int] = field(default_factory=list)
    """Their addresses."""

    @property
    def are_aligned(self) -> bool:
        """Whether all addresses are multiples of 16 bytes, and all sizes of 8 elements."""
        return self.bits[_SIZE] % 8 == 0 and not any(bits % 16 for bits in self.bits[_GRADIENT:_STEP])

    def count(self, addresses: list[int]) -> list[int]:
        """Count up the steps at these addresses in host memory; return them."""
        if self.counted != addresses:  # whose tensors the rows hold
            self.counted, self.counters = addresses, [ctypes.c_int64.from_address(address) for address in addresses]
        counts = []
        for counter in self.counters:
            counter.value = count = counter.value + 1
            counts.append(count)
        return counts


class TritonKernel:
    """One launch for all rows. Tables are cached for each parameter group; only changed columns are copied again."""

    name = "Triton"

    def __init__(self) -> None:
        # By device and the address of the first weight, which tells groups apart.
        self._tables: dict[tuple[torch.device, int], _Tables] = {}
        # A captured graph copies its tables from host memory at each replay.
        self._captured: list[Any] = []

    def __call__(self, rows: list[Row], call: Call) -> None:
        """See `Kernel`."""
        # Triton launches on the current GPU, which need not be the one that the tensors are on.
        with torch.cuda.device_of(rows[0].weight):
            for launched, addresses in apart(rows, [row.weight.data_ptr() for row in rows]):
                self._prepare(launched, addresses, call)()
            torch.autograd.graph.increment_version([row.weight for row in rows])  # as torch's operations in place do

    def _prepare(self, rows: list[Row], addresses: list[int], call: Call) -> Callable[[], object]:
        """Increment the step counts, copy changed addresses to the device, and return the launch."""
        s, first = call.settings, rows[0]
        tables = self._advance(rows, addresses, call)
        unused = tables.table
        rates = unused if call.lr is None else self._rates(call, tables.table.device)
        device = unused.device  # to which torch's fused optimizers move these too
        scale = unused if call.grad_scale is None else call.grad_scale.to(device).double().reciprocal().float()
        return functools.partial(
            stacey_step[(tables.programs,)],
            tables.table, tables.block_rows, tables.block_numbers, rates, scale,
            unused if call.found_inf is None else call.found_inf.to(device),
            *float_constants(s).values(),
            **compile_time_values(
                s, first.weight.dtype, first.gradient.dtype, first.z.dtype, stochastic=call.stochastic,
                lr_on_device=call.lr is not None, has_scale=call.grad_scale is not None,
                has_found_inf=call.found_inf is not None, aligned=tables.are_aligned,
            ),
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip

    def _rates(self, call: Call, device: torch.device) -> Tensor:
        """Return lr, which must be there, 1 - tau, tau, lambda, alpha, log2(alpha) in parts: on the device, float64."""
        s = call.settings
        assert call.lr is not None
        lr = call.lr.detach().to(device).reshape(1).float().double()
        numbers = [1.0 - s.tau, s.tau, s.weight_decay, s.alpha, *log2_in_parts(s.alpha)]
        rest = torch.empty(len(numbers), dtype=torch.float64, device=device)
        self._copy(np.array(numbers), rest)
        if call.lr_reference is not None:
            alpha, tau, *log2_alpha = scale_with_lr(lr, call.lr_reference, s.alpha, s.tau, torch.float32).split(1)
            rest = torch.cat([1.0 - tau, tau, rest[2:3], alpha, *log2_alpha])
        return torch.cat([lr, rest])

    def _advance(self, rows: list[Row], weights_at: list[int], call: Call) -> _Tables:
        """Increment the rows' step counts, copy changed addresses to the device, and return the rows' tables."""
        weights, gradients, zs, ms, steps = zip(*rows, strict=True)
        device, capturing = weights[0].device, is_capturing()
        sizes = list(map(Tensor.numel, weights))
        key = (call.seed, call.capturable, *sizes)
        gradients_at, *states_at = (list(map(Tensor.data_ptr, column)) for column in (gradients, zs, ms, steps))
        addresses = [gradients_at, weights_at, *states_at]
        group = device, next((address for address, size in zip(addresses[1], sizes, strict=True) if size > 0), 0)
        # A graph's are its own: it fills them at each replay, and nothing in them may change.
        found = None if capturing else self._tables.pop(group, None)
        if found is None or found.key != key:
            found = self._make_tables(key, sizes, device)
        if call.capturable:
            if call.found_inf is None:
                torch._foreach_add_(steps, 1)
            else:
                torch._foreach_add_(steps, [(call.found_inf == 0).reshape(()).to(device, torch.int64)] * len(steps))
            columns = [[0] * len(steps), *addresses, sizes]
        else:
            columns = [found.count(addresses.pop()), *addresses, found.steps, sizes]
        self._send(found, columns)
        if capturing:
            self._captured.append(found)
        else:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.pop(next(iter(self._tables)))  # of a group that has gone: the oldest
            self._tables[group] = found
        return found

    def _make_tables(self, key: tuple[Any, ...], sizes: list[int], device: torch.device) -> _Tables:
        """Make tables that fit these sizes, whose columns are still to be sent."""
        blocks = -(-np.array(sizes, np.int64) // BLOCK)
        for shift in range(_SHIFT, -1, -1):
            entries = -(-blocks >> shift)
            if (entries.sum() << shift) <= (1 + _EMPTY) * blocks.sum():
                break
        rows = np.repeat(np.arange(len(sizes), dtype=np.int32), entries)
        numbers = np.arange(len(rows)) - np.repeat(np.cumsum(entries) - entries, entries)
        table = torch.empty(_HEADER + 7 * len(sizes), dtype=torch.int64, device=device)
        block_rows = torch.empty(len(rows), dtype=torch.int32, device=device)
        block_numbers = torch.empty(len(rows), dtype=torch.int64, device=device)
        header = [key_base(key[0], STATES), key_base(key[0], WEIGHT), len(sizes), shift]
        self._copy(np.array(header, np.int64), table[:_HEADER])
        self._copy(rows, block_rows)
        self._copy(numbers, block_numbers)
        steps = [table.data_ptr() + 8 * (_HEADER + i) for i in range(len(sizes))]
        return _Tables(key, table, block_rows, block_numbers, len(rows) << shift, steps)

    def _send(self, tables: _Tables, columns: list[list[int]]) -> None:
        """Send the columns from the first to the last that differ from what was sent, in one copy."""
        changed = [i for i, column in enumerate(columns) if column != tables.columns[i]]
        if changed:
            start, stop, n = changed[0], changed[-1] + 1, len(columns[0])
            numbers = np.array(columns[start:stop], np.int64)
            self._copy(numbers.reshape(-1), tables.table[_HEADER + start * n : _HEADER + stop * n])
            tables.columns[start:stop] = columns[start:stop]
            tables.bits[start:stop] = np.bitwise_or.reduce(numbers, axis=1).tolist()

    def _copy(self, numbers: NDArray[Any], there: Tensor) -> None:
        """Copy numbers to a device, for which the host does not wait."""
        host = torch.from_numpy(numbers)
        if there.is_cuda:
            host = host.pin_memory()
        there.copy_(host, non_blocking=True)
        if is_capturing():  # a graph copies them again at each replay
            self._captured.append(host)


@functools.cache
def find() -> TritonKernel:
    """Return the kernel for GPUs. Raises NoKernelError where Triton cannot compile, for want of a C compiler."""
    if isinstance(stacey_step, triton.JITFunction):  # and not Triton's interpreter
        try:
            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # of its driver, the C compiler, the linker
            raise NoKernelError(f"Triton cannot compile here: {one_line(error)}") from error
    return TritonKernel()
