"""Recompute activations in the backward pass: all of a layer's, or only those that take little time."""

import functools
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from stacey_dist.errors import SettingsError
from stacey_dist.training.settings.config import Checkpointing

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


def checkpoint_activations(model: Any, kind: Checkpointing) -> None:
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
        options["context_fn"] = functools.partial(_contexts, frozenset(KEPT - changed))
    # transformers 5.23 has renamed it, and warns of the name that older versions have.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(options)


def _contexts(kept: frozenset[str]) -> tuple[Any, Any]:
    """Return torch's contexts of selective checkpointing, for the forward pass and for recomputation."""
    forward, again = create_selective_checkpoint_contexts(functools.partial(_policy, kept))
    again.__class__ = _recomputing(type(again), kept)  # type: ignore[arg-type]
    return forward, again


@functools.cache
def _recomputing(context: type, kept: frozenset[str]) -> type:
    """Return torch's context of recomputation, which is shown only the operations that are kept.

    It raises an error for operations that the forward pass has not had, and ZeRO-3 gathers weights at other times.
    """

    class Recomputing(context):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not _is_kept(func, kept):
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    return Recomputing


def _policy(kept: frozenset[str], _: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operation, kept) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(operation: Any, kept: frozenset[str]) -> bool:
    schema = getattr(operation, "_schema", None)
    return schema is not None and schema.name in kept
