"""What the plan says of activations is what autograd keeps, and what is there at once, in a real LLaMA on the CPU."""

import itertools
import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from stacey_dist.models.causal_lm import attention_of, causal_config, new_model
from stacey_dist.plan.activations import activations
from stacey_dist.plan.measured import _measure, measured
from stacey_dist.training.activation_checkpointing import KEPT, checkpoint_activations
from tests.models.architectures import described


def llama(vocabulary, hidden, intermediate, layers, heads, key_value_heads, tied):
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, tie_word_embeddings=tied,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip


# Sequences, length, model: one whose softmax is the largest part, one whose layers are, with grouped keys; one tied.
SHAPES = {
    "wide vocabulary": (3, 32, llama(1001, 64, 172, 2, 4, 4, False)),
    "wide layers": (2, 64, llama(61, 64, 176, 6, 8, 2, False)),
    "tied": (1, 16, llama(1013, 36, 53, 2, 6, 3, True)),
}

VOCABULARIES = {shape.vocab_size for _, _, shape in SHAPES.values()}


class Results(TorchDispatchMode):
    """Keeps what selective checkpointing keeps, where autograd does not know of it: not in the head."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function._schema.name in KEPT:
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1] not in VOCABULARIES:
                    self.keep(tensor)
        return result


ARITHMETICS = ("float32", "low", "autocast")
CHECKPOINTING = (False, "selective", True)


# Every two of a shape, an arithmetic and a checkpointing meet in CI; all three with -m exhaustive.
@pytest.mark.parametrize(
    ("name", "arithmetic", "checkpointing"),
    [
        pytest.param(
            list(SHAPES)[i], ARITHMETICS[j], CHECKPOINTING[k],
            marks=() if (i + j + k) % 3 == 0 else pytest.mark.exhaustive,
        )
        for i, j, k in itertools.product(range(3), repeat=3)
    ],
)  # fmt: skip
def test_activations_are_what_autograd_keeps(name, arithmetic, checkpointing):
    sequences, length, shape = SHAPES[name]
    model = LlamaForCausalLM(shape).to(torch.bfloat16 if arithmetic == "low" else torch.float32)
    assert model.config._attn_implementation == "sdpa"
    checkpoint_activations(model, checkpointing)
    model.train()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    inputs = torch.randint(shape.vocab_size, (sequences, length))
    labels = inputs.clone()
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # alive, so that no other one takes its place
        return tensor

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
            logits = model(input_ids=inputs).logits
        logits = logits.float() if arithmetic == "autocast" else logits  # as Accelerate does
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        Results(keep) if checkpointing == "selective" else nullcontext(),
    ):
        loss()
    planned = activations(shape.to_dict(), sequences, length, arithmetic, checkpointing=checkpointing)
    saved = sum(storage.nbytes() for storage in kept.values())
    if checkpointing:  # autograd does not know of two arguments of each layer, the rotations
        saved += 2 * length * shape.head_dim * (2 if arithmetic == "low" else 4)
    assert planned.saved == saved
    kept.clear()
    tracker = MemTracker()
    tracker.track_external(model, inputs, labels)
    with tracker:
        loss().backward()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"] - 2 * sum(parameters.values())
    assert planned.peak == pytest.approx(peak, rel=0.02)
    # Of any architecture they are counted without memory; positions are counted there, too.
    counted = measured(json.dumps(model.config.to_dict()), sequences, length, arithmetic, checkpointing=checkpointing)
    assert counted.saved == pytest.approx(saved, abs=100 * length)
    assert counted.peak == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_the_copies_of_matrices_that_autocast_makes_are_counted_in_every_layer(checkpointing):
    """Without memory, for a model whose loss needs more than the copies of two layers, and less than those of all."""
    own = llama(4000, 512, 1400, 16, 8, 8, False).to_dict()
    how = dict(sequences=2, length=384, arithmetic="autocast", checkpointing=checkpointing)
    counted, planned = measured(json.dumps(own), **how), activations(own, **how)
    assert counted.saved == pytest.approx(planned.saved, rel=1e-3)
    assert counted.peak == pytest.approx(planned.peak, rel=1e-3)


# The layers of gemma3_text differ in their attention; those of deepseek_v3 in their modules.
@pytest.mark.parametrize(
    ("kind", "arithmetic", "checkpointing"),
    [
        pytest.param(kind, *how, marks=[pytest.mark.exhaustive] * ((kind, how[0]) != ("mixtral", "autocast")))
        for kind in ("mixtral", "gemma3_text", "deepseek_v3")
        for how in (("low", False), ("autocast", True), ("low", "selective"))
    ],
)
def test_more_layers_and_sequences_are_extrapolated(kind, arithmetic, checkpointing):
    own = described(kind) | {"num_hidden_layers": 5, "output_router_logits": False}
    if kind == "gemma3_text":
        own["layer_types"] = ["sliding_attention"] * 4 + ["full_attention"]
    how = (16, arithmetic)
    model = new_model(causal_config(own), attention_of(causal_config(own), 16)).train()
    model.to(torch.bfloat16 if arithmetic == "low" else torch.float32)
    checkpoint_activations(model, checkpointing)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    saved, *parts = _measure(model, 3, *how)  # for real: a router sends tokens where it will
    counted = measured(json.dumps(own), 3, *how, checkpointing=checkpointing)
    assert counted.saved == pytest.approx(saved, rel=0.02)
    assert counted.peak == pytest.approx(max(parts), rel=0.05)
