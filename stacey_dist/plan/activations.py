"""Bytes that the forward pass of `LlamaForCausalLM` keeps for the backward pass, and that both need for a moment.

The formulas follow transformers' modeling_llama line by line, with torch's `scaled_dot_product_attention` (which
keeps queries, keys, values, output and a logarithm a head, and no matrix of scores). They equal to the byte what
torch's autograd keeps on CPUs (`tests/plan/test_activations.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stacey_dist.training.settings.config import Checkpointing

FLOAT = 4
INDEX = 8  # bytes of a token's number

# "float32"; "low", where weights and activations are bfloat16 or float16 (DeepSpeed, FSDP2); "autocast", where the
# residual stream is float32 and every matrix is cast for its product (one process, DDP).
Arithmetic = Literal["float32", "low", "autocast"]


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank.

    Attributes:
        saved: kept from the forward pass for the backward pass, when the loss is known, its softmax included.
        peak: the most that is there at once.
    """

    saved: int
    peak: int


def activations(
    llama: Mapping[str, Any],
    sequences: int,
    length: int,
    arithmetic: Arithmetic,
    *,
    checkpointing: Checkpointing,
) -> Activations:
    """Return the bytes of a micro-batch of `sequences` sequences of `length` tokens.

    Args:
        llama: the numbers of a LLaMA, as in a config.json.
    """
    hidden, intermediate, vocabulary = llama["hidden_size"], llama["intermediate_size"], llama["vocab_size"]
    heads, layer_count, tied = llama["num_attention_heads"], llama["num_hidden_layers"], llama["tie_word_embeddings"]
    head_size = hidden // heads
    keys = llama["num_key_value_heads"] * head_size
    tokens = sequences * length
    size = FLOAT if arithmetic == "float32" else 2
    stream = 2 if arithmetic == "low" else FLOAT  # an element of the residual stream
    # The norm's input in float32, its reciprocal root, and the normalized value; what it gives is counted below.
    norm = FLOAT * hidden + FLOAT + stream * hidden
    # Autocast casts the input of a product anew for each that reads it: queries, keys and values; gate and up.
    copies = (3, 2) if arithmetic == "autocast" else (1, 1)
    attention = size * (copies[0] * hidden + 2 * hidden + 2 * keys) + FLOAT * heads
    feed_forward = size * (copies[1] * hidden + 4 * intermediate)
    layer = tokens * (2 * norm + attention + feed_forward)
    # Rotations are computed once, for a batch of one.
    rotations = 2 * length * head_size * (2 if arithmetic == "low" else FLOAT)
    # The results that selective checkpointing keeps of a layer: of its products, and of attention.
    kept = size * (4 * hidden + 2 * keys + 2 * intermediate) + FLOAT * heads
    kept = tokens * kept if checkpointing == "selective" else 0
    layers = layer_count * (tokens * stream * hidden + kept if checkpointing else layer)
    softmax = tokens * vocabulary * FLOAT
    # Inputs and labels, the last norm and its output, the softmax, and the sum that divides the loss.
    rest = tokens * (2 * INDEX + norm + size * hidden) + softmax + FLOAT
    # Autocast's copies of the matrices, without those of layers that are computed again.
    autocast = size if arithmetic == "autocast" else 0
    matrices_of_layer = hidden * (2 * hidden + 2 * keys + 3 * intermediate) * autocast
    head = vocabulary * hidden * autocast
    matrices = layer_count * matrices_of_layer + head
    # With checkpointing, rotations are kept too: they are an argument of every layer.
    saved = layers + rest + (head if checkpointing else matrices) + rotations
    before_loss = saved - softmax
    # A matrix's gradient, and under autocast that of its copy; the embedding is not cast.
    gradient = stream + autocast
    elements = vocabulary * hidden
    embedding, logits = elements * stream, tokens * size * vocabulary
    # In the last layer's backward pass, that of the head is over. It begins with the feed-forward block: the gradient
    # of its product and of a matrix, then those of the product's factors; and of its output.
    wide = size * intermediate * tokens
    last_norm = tokens * (norm + size * hidden)
    in_layer = before_loss - last_norm - head + tokens * stream * hidden
    in_layer += max(2 * wide, wide + gradient * intermediate * hidden) + (embedding if tied else 0)
    if checkpointing:  # what a layer begins with is kept already, unless the norm casts it
        in_layer += layer - (tokens * FLOAT * hidden if stream == FLOAT else 0) + matrices_of_layer
        # What was kept of a layer becomes a part of it again, but for the result that is added to the stream.
        in_layer -= kept - (tokens * size * hidden if kept else 0)
    # The forward pass ends with the logits. Autocast then still has a copy of all matrices, and the last norm's output
    # before it was cast.
    at_logits = logits + (tokens * stream * hidden if autocast else 0)
    # A layer that keeps nothing needs most in its feed-forward block, before there is a copy of the output matrix.
    in_block = (2 if kept else 3) * wide + tokens * FLOAT * hidden - last_norm - head if checkpointing else 0
    in_forward = before_loss + (matrices - head if checkpointing else 0) + max(at_logits, in_block)
    in_loss = saved + 2 * softmax  # two gradients of the size of the softmax
    # The output matrix's gradient is there before it is added up. A tied embedding has the output's gradient too.
    in_head = before_loss + max(logits + (autocast or stream) * elements, gradient * elements)
    in_embedding = tokens * 2 * INDEX + rotations + embedding * (3 if tied else 1)
    return Activations(saved, peak=max(in_forward, in_loss, in_head, in_layer, in_embedding))
