"""What the plan says of activations is what autograd keeps, and what is there at once, in a real LLaMA on the CPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from stacey_dist.plan.activations import activations
from stacey_dist.plan.model import Llama

# Sequences, length, model: one whose softmax is the largest part, one whose layers are, with grouped keys; one tied.
SHAPES = {
    "wide vocabulary": (3, 32, Llama(1001, 64, 172, 2, 4, 4, False)),
    "wide layers": (2, 64, Llama(61, 64, 176, 6, 8, 2, False)),
    "tied": (1, 16, Llama(1013, 36, 53, 2, 6, 3, True)),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "arithmetic"), list(itertools.product(SHAPES, ["float32", "low", "autocast"])))
def test_activations_are_what_autograd_keeps(name, arithmetic, checkpointing):
    sequences, length, shape = SHAPES[name]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
            tie_word_embeddings=shape.tied, max_position_embeddings=length, use_cache=False,
        )
    ).to(torch.bfloat16 if arithmetic == "low" else torch.float32)  # fmt: skip
    assert model.config._attn_implementation == "sdpa"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    inputs = torch.randint(shape.vocabulary, (sequences, length))
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

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    planned = activations(shape, sequences, length, arithmetic, checkpointing=checkpointing)
    saved = sum(storage.nbytes() for storage in kept.values())
    if checkpointing:  # autograd does not know of two arguments of each layer, the rotations
        saved += 2 * length * shape.head_size * (2 if arithmetic == "low" else 4)
    assert planned.saved == saved
    kept.clear()
    tracker = MemTracker()
    tracker.track_external(model, inputs, labels)
    with tracker:
        loss().backward()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"] - 2 * sum(parameters.values())
    assert planned.peak == pytest.approx(peak, rel=0.02)
