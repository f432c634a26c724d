"""Recompute activations in the backward pass: all of a layer's, or only those that take little time."""

import functools
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from stacey_dist.errors import SettingsError
from stacey_dist.training.settings.config import Recomputed

# Products of activations and weights, and fused attention. Not `bmm`: attention without a fused kernel would keep a
# matrix of scores for each head.
KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}
"""Operations whose results selective checkpointing keeps."""


def compute_again(model: Any, kind: Recomputed) -> None:
    """Have a model of transformers compute its layers' activations again, as `train.gradient_checkpointing` says.

    Raises SettingsError if it cannot.
    """
    if not kind:
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise SettingsError(f"train.gradient_checkpointing: {kind} is not allowed; {type(model).__name__} has none")
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        # transformers adds the experts' biases, where they have some, to the result itself.
        changed = {"aten::_grouped_mm"} if any(getattr(m, "has_bias", False) for m in model.modules()) else set()
        policy = functools.partial(_policy, KEPT - changed)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable(options)


def _policy(kept: set[str], _: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    schema = getattr(operation, "_schema", None)
    is_kept = schema is not None and schema.name in kept
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
