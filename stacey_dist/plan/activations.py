"""What the forward pass of `LlamaForCausalLM` keeps for the backward pass, and what both need for a moment, in bytes.

The formulas follow transformers' modeling_llama line by line, with torch's `scaled_dot_product_attention` (which
keeps queries, keys, values, output and a logarithm a head, and no matrix of scores). They equal to the byte what
torch's autograd keeps on CPUs (`tests/test_plan_activations.py`).
"""

from dataclasses import dataclass
from typing import Literal

from stacey_dist.plan.model import Llama

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
        loss: besides `saved`, what the backward pass of the loss has at once.
        recomputed: with gradient checkpointing, what a layer keeps while its backward pass runs.
        backward: gradients inside a layer's backward pass (an estimate: the feed-forward block's three, and two of
            the residual stream's size in float32).
        softmax: the part of `saved` that is gone when the first layer's backward pass begins.
    """

    saved: int
    loss: int
    recomputed: int
    backward: int
    softmax: int

    @property
    def peak(self) -> int:
        """The most that is there at once, in the loss or in a layer's backward pass."""
        return max(self.saved + self.loss, self.saved - self.softmax + self.recomputed + self.backward)


def activations(
    model: Llama, sequences: int, length: int, arithmetic: Arithmetic, *, checkpointing: bool
) -> Activations:
    """Of a micro-batch of `sequences` sequences of `length` tokens."""
    tokens, hidden = sequences * length, model.hidden
    size = FLOAT if arithmetic == "float32" else 2
    stream = 2 if arithmetic == "low" else FLOAT  # an element of the residual stream
    # The norm's input in float32, its reciprocal root, and the normalized value; what it gives is counted below.
    norm = FLOAT * hidden + FLOAT + stream * hidden
    keys = model.key_value_heads * model.head_size
    # Autocast casts the input of a product anew for each that reads it: queries, keys and values; gate and up.
    copies = (3, 2) if arithmetic == "autocast" else (1, 1)
    attention = size * (copies[0] * hidden + 2 * hidden + 2 * keys) + FLOAT * model.heads
    feed_forward = size * (copies[1] * hidden + 4 * model.intermediate)
    layer = tokens * (2 * norm + attention + feed_forward)
    # Rotations are computed once, for a batch of one.
    rotations = 2 * length * model.head_size * (2 if arithmetic == "low" else FLOAT)
    layers = model.layers * (tokens * stream * hidden if checkpointing else layer)
    softmax = tokens * model.vocabulary * FLOAT
    # Inputs and labels, the last norm and its output, the softmax, and the sum that divides the loss.
    rest = tokens * (2 * INDEX + norm + size * hidden) + softmax + FLOAT
    # Autocast's copies of the matrices, without those of layers that are computed again.
    matrices = model.vocabulary * hidden if checkpointing else model.matrix_elements
    cast = matrices * size if arithmetic == "autocast" else 0
    return Activations(
        # With checkpointing, rotations are kept too: they are an argument of every layer.
        saved=layers + rest + cast + rotations,
        # Two gradients of the size of the logits beside the softmax: of the loss, and of the softmax's input.
        loss=2 * softmax,
        recomputed=layer if checkpointing else 0,
        backward=tokens * (3 * size * model.intermediate + 2 * FLOAT * hidden),
        softmax=softmax,
    )
