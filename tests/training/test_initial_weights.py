"""Initial weights: functions of (seed, name, element), in the distributions that torch's own initialization gives.

`tests/plan/test_ranks.py`, whose runs have them, compares them over engines and numbers of processes.
"""

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stacey_dist.models import build_resnet
from stacey_dist.training import initial_weights
from stacey_dist.training.counter_random import normal, uniform
from stacey_dist.training.initial_weights import InitialWeights, make_model

LLAMA = LlamaConfig(
    vocab_size=501, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.03, pad_token_id=7, attention_bias=True,
)  # fmt: skip

GPT2 = GPT2Config(
    n_layer=2, n_embd=64, n_head=4, vocab_size=501, n_positions=33, bos_token_id=0, eos_token_id=0
)  # fmt: skip


def made(build, seed=0):
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    return make_model(SimpleNamespace(config=SimpleNamespace(seed=seed), accelerator=accelerator), build)


def filled(build, seed=0):
    model = made(build, seed)
    model.initial_weights.fill(model, torch.optim.SGD(model.parameters()), torch.device("cpu"))
    return model


def reference(key, position):
    """splitmix64's finalizer, with a second part of the key in it, in Python's integers; Box and Muller in float64."""
    mask = (1 << 64) - 1
    first, second = (int.from_bytes(hashlib.sha256(key.encode()).digest()[i : i + 8], "little") for i in (0, 8))
    x = (position * 0x9E3779B97F4A7C15 + first) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask) ^ second
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    x ^= x >> 31
    high, low = ((half ^ 1 << 31) - (1 << 31) for half in (x >> 32, x & 0xFFFFFFFF))
    u = high / 2**32 + 0.5
    return u, math.sqrt(-2 * math.log(u + 2**-32)) * math.sin(math.pi / 2 * low / 2**31)


def test_the_numbers_are_what_the_formulas_say():
    positions = [0, 1, 1000, 2**31 + 5, 2**40]
    for position in positions:
        u, z = reference("0 a.weight", position)
        assert uniform("0 a.weight", position, position + 1).item() == u
        # log2 has a relative error of 1.2e-6, the root half of it
        assert normal("0 a.weight", position, position + 1).item() == pytest.approx(z, rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("random", [normal, uniform])
def test_a_part_has_the_numbers_of_the_whole(random):
    whole = random("key", 0, 1000)
    for start, stop in ((0, 1), (3, 20), (17, 17), (501, 1000)):
        assert torch.equal(random("key", start, stop), whole[start:stop])
    others = [random("key", 1, 1001), random("another", 0, 1000)]
    assert not any(torch.equal(whole, other) for other in others)


def test_the_distributions_are_those_of_torch():
    count = 1 << 20
    ours, torchs = normal("key", 0, count), torch.randn(count, dtype=torch.float64)
    # Five standard errors of a mean of so many numbers, whose variances are those of a normal distribution's powers.
    for power, variance in ((1, 1), (2, 2), (3, 15), (4, 96)):
        mean = {2: 1, 4: 3}.get(power, 0)
        assert abs(ours.pow(power).mean() - mean) < 5 * math.sqrt(variance / count)
    ranks = [ours.sort().values, torchs.sort().values]
    # Kolmogorov and Smirnov's distance, which two samples from one distribution exceed once in 10^6 times.
    for sample, others in (ranks, ranks[::-1]):
        below = torch.searchsorted(others, sample) / count
        assert (below - torch.arange(count) / count).abs().max() < 2.7 * math.sqrt(2 / count)
    neighbours = (ours[1:] * ours[:-1]).mean(), (ours * normal("other key", 0, count)).mean()
    assert all(abs(product) < 5 / math.sqrt(count) for product in neighbours)
    flat = uniform("key", 0, count)
    assert 0 <= flat.min() < 1e-4
    assert 1 - 1e-4 < flat.max() < 1
    assert abs(torch.histc(flat, 64) - count / 64).max() < 6 * math.sqrt(count / 64)


@pytest.mark.parametrize("build", [
    lambda: LlamaForCausalLM(LLAMA),
    lambda: GPT2LMHeadModel(GPT2),
    lambda: build_resnet(18, ["a", "b", "c"], stem="cifar", width=16, zero_init_residual=True),
    lambda: nn.Sequential(nn.Linear(31, 63), nn.Conv1d(63, 5, 3), nn.Bilinear(5, 7, 9), nn.Embedding(11, 3)),
])  # fmt: skip
def test_each_parameter_is_distributed_as_its_modules_initialization_says(build):
    torch.manual_seed(1)
    ours, theirs = filled(build), build()
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for (name, mine), own in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.dtype, mine.shape) == (own.dtype, own.shape)
        if own.min() == own.max():
            assert torch.equal(mine, own), name
            continue
        # The standard error of a deviation is 1 / sqrt(2 n) of it, here of two samples.
        n, deviation = own.numel(), own.std()
        assert abs(mine.std() / deviation - 1) < 6 / math.sqrt(n), name
        assert abs(mine.mean() - own.mean()) < 6 * deviation * math.sqrt(2 / n), name
        bounded = own.abs().max() < 2 * deviation and n > 100  # uniform: the bound is sqrt(3) deviations
        assert not bounded or mine.abs().max() < 1.01 * own.abs().max() + 3 * deviation / n, name
        assert bounded or n < 100 or mine.abs().max() > 2 * deviation, name
        assert torch.equal(mine == 0, own == 0), name  # a padding token's row
    for (name, mine), own in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(mine, own), name


def test_the_seed_and_the_name_decide_and_nothing_else():
    first, again, other = (filled(lambda: LlamaForCausalLM(LLAMA), seed) for seed in (0, 0, 1))
    deeper = filled(lambda: LlamaForCausalLM(LlamaConfig(**(LLAMA.to_dict() | {"num_hidden_layers": 3}))))
    matrices = {name: p for name, p in first.named_parameters() if p.dim() > 1}
    for name, param in matrices.items():
        assert torch.equal(param, again.get_parameter(name))
        assert torch.equal(param, deeper.get_parameter(name))
        assert not torch.equal(param, other.get_parameter(name))
    same = [(a, b) for a in matrices for b in matrices if a < b and torch.equal(matrices[a], matrices[b])]
    assert not same


def test_tied_parameters_stay_one_and_any_chunks_give_the_same(monkeypatch):
    config = LlamaConfig(**(LLAMA.to_dict() | {"tie_word_embeddings": True}))
    whole = filled(lambda: LlamaForCausalLM(config))
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    monkeypatch.setitem(initial_weights._CHUNK, "cpu", 777)
    for mine, own in zip(filled(lambda: LlamaForCausalLM(config)).parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, own)


class Given(nn.Module):
    """Parameters that an initialization computes by itself, and in parts."""

    def __init__(self):
        super().__init__()
        self.slopes, self.parts = nn.Parameter(torch.empty(3, 4)), nn.Parameter(torch.empty(5, 3))
        with torch.no_grad():
            self.slopes.copy_(torch.rand(4).log())
            nn.init.normal_(self.parts)
            nn.init.zeros_(self.parts[3])
            nn.init.uniform_(self.parts[1:3], 2.0, 3.0)


def test_values_of_its_own_and_writes_to_rows():
    first, again = filled(Given), filled(Given)
    assert torch.equal(first.slopes, again.slopes)
    assert torch.equal(first.slopes[0], first.slopes[2])
    assert (first.slopes < 0).all()
    assert (first.parts[3] == 0).all()
    assert ((first.parts[1:3] >= 2) & (first.parts[1:3] <= 3)).all()
    assert torch.equal(first.parts[4], normal("0 parts", 12, 15).to(torch.float32))


def written_by(initialization):
    def build():
        model = nn.Linear(8, 8)
        initialization(model.weight)
        return model

    return build


def column():
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight[:, 3])
    return model


def frozen():
    return nn.Linear(8, 8).requires_grad_(False)


def constant():
    model = nn.Linear(8, 8)
    model.scale = nn.Parameter(torch.full((3,), 2.0))
    return model


@pytest.mark.parametrize("build", [
    *map(written_by, [nn.init.orthogonal_, nn.init.trunc_normal_, lambda weight: nn.init.sparse_(weight, 0.5)]),
    column, frozen, constant,
])  # fmt: skip
def test_a_model_whose_initialization_is_not_known_is_built_as_it_is(build):
    model = made(build, seed=3)
    assert not hasattr(model, "initial_weights")
    torch.manual_seed(3)
    for mine, own in zip(model.parameters(), build().parameters(), strict=True):
        assert torch.equal(mine, own)


def test_a_process_that_is_given_such_weights_makes_none(monkeypatch):
    monkeypatch.setattr(initial_weights, "loads_weights_from_rank0", lambda accelerator, model: True)
    build = lambda: LlamaForCausalLM(LLAMA).requires_grad_(False)  # noqa: E731
    run = SimpleNamespace(config=SimpleNamespace(seed=0), accelerator=SimpleNamespace(is_main_process=False))
    other, after = make_model(run, build), torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(after, torch.random.get_rng_state())  # no random number was drawn, so no weight was touched
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in build().named_parameters()]


def test_narrow_weights_are_the_float32_ones_rounded():
    wide = filled(lambda: LlamaForCausalLM(LLAMA))
    narrow = made(lambda: LlamaForCausalLM(LLAMA)).to(torch.bfloat16)
    assert isinstance(narrow.initial_weights, InitialWeights)
    narrow.initial_weights.fill(narrow, torch.optim.SGD(narrow.parameters()), torch.device("cpu"))
    for mine, own in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(mine, own.to(torch.bfloat16))
