"""A real batch, split over ranks: what differs from one process is the noise of the order of sums, as for AdamW.

For each engine, number of ranks and optimizer, the distance of the weights after 50 updates from those of one process
on the whole batch, relative to how far the weights have moved.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stacey_dist import Stacey
from stacey_dist.sharding import fragments
from tests.sharding.engines import ENGINES, Trainer, gather
from tests.sharding.processes import outcome, spawn
from tests.shared import made_once

pytestmark = pytest.mark.slow
STEPS, BATCH, LENGTH, VOCABULARY = 50, 8, 16, 64

SETTINGS = {"lr": 0.01, "p": 3.0, "alpha": 0.01, "tau": 0.02, "betas": (0.9, 0.99)}
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.003}),
    "stacey": (Stacey, {**SETTINGS, "state_dtype": "float32"}),
    "stacey in bfloat16": (Stacey, SETTINGS),
}


class Loss(nn.Module):
    """A tiny LLaMA; forward gives the mean loss of its tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, use_cache=False, **shape)
        self.large = LlamaForCausalLM(config)

    def forward(self, tokens):
        logits = self.large(input_ids=tokens[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch(step):
    """Return tokens with an order in them: each follows from the one before, one time in four at random."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    for i in range(1, LENGTH + 1):
        kept = torch.rand(BATCH, generator=generator) < 0.75
        tokens[:, i] = torch.where(kept, (tokens[:, i - 1] * 5 + 3) % VOCABULARY, tokens[:, i])
    return tokens


@functools.cache
def one_process(name, **changes):
    """Return (weights at the start, weights at the end, losses) of one process on the whole batch."""
    optimizer_class, settings = OPTIMIZERS[name]
    model = Loss()
    start = flat(dict(model.named_parameters()))
    optimizer = optimizer_class(model.parameters(), **settings | changes)
    losses = []
    for step in range(STEPS):
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return start, flat(dict(model.named_parameters())), torch.tensor(losses)


def flat(tensors):
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


def on_engine(engine, name):
    optimizer_class, settings = OPTIMIZERS[name]
    if optimizer_class is torch.optim.AdamW and engine.startswith("zero") and engine != "zero_redundancy":
        settings = settings | {"torch_adam": True, "weight_decay": 0.01}
    model = Loss()
    trainer = Trainer(engine, model, lambda model: [{"params": list(model.parameters())}], optimizer_class, settings)
    share = BATCH // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    losses = []
    for step in range(STEPS):
        loss = trainer.step(batch(step)[mine]).detach()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    weights = {key: weight for key, (weight, _) in gather(fragments(trainer.model, trainer.optimizer)).items()}
    return flat(weights), torch.tensor(losses)


def distance(start, end, other):
    return float((other - end).norm() / (end - start).norm())


def check(engine, found):
    for name in OPTIMIZERS:
        start, end, losses = one_process(name)
        ours, our_losses = on_engine(engine, name)
        found[engine, name] = (distance(start, end, ours), float((our_losses - losses).abs().max()))


def all_engines(rank):
    found = {}
    failures = {engine: outcome(check, engine, found) for engine in ENGINES}
    start, end, losses = one_process("stacey in bfloat16")
    _, other, other_losses = one_process("stacey in bfloat16", seed=1)
    return failures, found, (distance(start, end, other), float((other_losses - losses).abs().max()))


def train_on_all_engines(_, world_size):
    return spawn(all_engines, world_size)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_split_of_a_batch_is_noise(world_size, engine):
    failures, found, other_seed = made_once(train_on_all_engines, world_size)
    assert failures[engine] is None, failures[engine]
    (adamw, adamw_loss), (stacey, stacey_loss), (bfloat16, bfloat16_loss) = (found[engine, name] for name in OPTIMIZERS)
    # float32 states: nearer to one process than AdamW comes on the same engine; both are 0 where no sum is split.
    assert stacey <= adamw <= 1e-4
    assert stacey_loss <= 4e-6  # 8 last places of a loss near 4
    assert adamw_loss <= 4e-6
    # bfloat16 states: rounded by bits that a gradient's last place decides, so no further away than another seed takes
    # one process. Both are random distances of the same size, and the largest difference of a loss varies more.
    distance, loss = other_seed
    assert bfloat16 <= 1.5 * distance
    assert bfloat16_loss <= 3 * loss
    assert distance < 0.03


def test_the_problem_is_learned():
    for name in OPTIMIZERS:
        _, _, losses = one_process(name)
        assert losses[-1] < losses[0] - 0.2
