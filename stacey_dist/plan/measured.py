"""The activations of a model of any architecture: counted while it computes without memory, on torch's fake tensors.

For a LLaMA they equal those of `stacey_dist.plan.activations`, nearly to the byte (`tests/plan/test_activations.py`).
"""

import functools
import json
import weakref
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights
from transformers.integrations import moe

import stacey_dist.training.tasks.llm_model  # noqa: F401  # it registers the attention
from stacey_dist.models.causal_lm import attention_of, causal_config, layer_classes, new_model
from stacey_dist.plan.activations import Activations, Arithmetic
from stacey_dist.training.activation_checkpointing import checkpoint_activations
from stacey_dist.training.settings.config import Checkpointing

# A peak is piecewise linear in the number of sequences. One line is fitted through small numbers and one through large
# ones; the higher one counts.
_FEW, _MANY = (1, 2), (64, 128)


def measured(
    described: str, sequences: int, length: int, arithmetic: Arithmetic, *, checkpointing: Checkpointing
) -> Activations:
    """Return the bytes of a micro-batch of `sequences` sequences of `length` tokens, as `activations` does.

    Args:
        described: a configuration, as in a config.json.
    """
    lines = [
        _lines(described, points, length, arithmetic, checkpointing)
        for points in ((_FEW, _MANY) if sequences > _FEW[1] else (_FEW,))
    ]
    saved, *moments = (max(round(a + b * sequences) for a, b in each) for each in zip(*lines, strict=True))
    return Activations(saved, peak=max(moments))


@functools.cache
def _lines(described: str, points: tuple[int, int], *how: Any) -> list[tuple[float, float]]:
    """Return the bytes of each part of an update as (a, b) of a + b x sequences."""
    first, second = (_bytes(described, sequences, *how) for sequences in points)
    slopes = [(q - p) / (points[1] - points[0]) for p, q in zip(first, second, strict=True)]
    return [(p - slope * points[0], slope) for p, slope in zip(first, slopes, strict=True)]


def _bytes(
    described: str, sequences: int, length: int, arithmetic: Arithmetic, checkpointing: Checkpointing
) -> list[int]:
    """Return what `_measure` gives for all layers, from one layer of each kind and what a second one adds."""
    config = causal_config(json.loads(described))
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16 if arithmetic == "low" else torch.float32)
        try:
            with no_init_weights():
                model = new_model(config, attention_of(config, length)).train()
        finally:
            torch.set_default_dtype(torch.float32)
        model.tie_weights()
        checkpoint_activations(model, checkpointing)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        measure = functools.partial(_measure, model, sequences, length, arithmetic)
        if (layers := _layers(model)) is None:
            return measure()
        kinds: dict[Any, list[tuple[nn.Module, Any]]] = {}
        types = getattr(config, "layer_types", None) or [None] * len(layers)
        for layer, attention in zip(layers, types, strict=True):
            shapes = tuple(tuple(param.shape) for param in layer.parameters())
            kinds.setdefault((type(layer), shapes, attention), []).append((layer, attention))

        def with_layers(chosen: list[tuple[nn.Module, Any]]) -> list[int]:
            layers._modules = {str(i): layer for i, (layer, _) in enumerate(chosen)}
            config.num_hidden_layers = len(chosen)
            if getattr(config, "layer_types", None):
                config.layer_types = [attention for _, attention in chosen]
            return measure()

        one_of_each = [members[0] for members in kinds.values()]
        found = base = with_layers(one_of_each)
        for members in kinds.values():
            if len(members) > 1:
                more = with_layers([*one_of_each, members[1]])
                found = [f + (len(members) - 1) * (m - b) for f, m, b in zip(found, more, base, strict=True)]
        return found


def _layers(model: Any) -> nn.ModuleList | None:
    """Return the list of all layers, if there is one."""
    classes = layer_classes(model)
    count = sum(isinstance(module, classes) for module in model.modules())
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next((found for found in lists if all(isinstance(layer, classes) for layer in found)), None)


def _measure(model: Any, sequences: int, length: int, arithmetic: Arithmetic) -> list[int]:
    """Return what is kept, and the most there is in each of `_Live.PARTS`: each is linear in layers and sequences."""
    inputs, labels = (torch.zeros((sequences, length), dtype=torch.int64) for _ in range(2))
    live = _Live([*model.parameters(), *model.buffers(), *(param.grad for param in model.parameters())])
    layers: list[nn.Module] = list(_layers(model) or [])
    hooks = [layer.register_forward_hook(live.enter_layers) for layer in layers[-1:]]
    hooks += [layer.register_forward_pre_hook(live.leave_layers) for layer in layers[:1]]
    # torch's grouped product has no shapes in float32 without memory; transformers' own keeps the same.
    # Some versions of transformers have no such function.
    grouped = patch.object(moe, "_can_use_grouped_mm", lambda _, w, *rest: w.dtype == torch.bfloat16, create=True)
    with live, grouped:
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
            logits = model(input_ids=inputs).logits
        live.enter("loss")  # autocast's copies of the matrices are no longer there
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        del logits
        saved = live.now
        live.enter("head")
        loss.backward()
    for hook in hooks:
        hook.remove()
    return [inputs.nbytes + labels.nbytes + size for size in (saved, *live.most.values())]


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, but for `known` ones.

    Attributes:
        now: bytes that are there.
        most: the most there was in each part of an update.
    """

    PARTS = ("forward", "loss", "head", "layers", "embedding")

    def __init__(self, known: list[Any]) -> None:
        super().__init__()
        self.now = 0
        self.most = dict.fromkeys(self.PARTS, 0)
        self.part = "forward"
        self._storages: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def enter(self, part: str) -> None:
        self.part = part
        self.most[part] = max(self.most[part], self.now)

    def enter_layers(self, _: Any, arguments: Any, output: Any) -> None:
        """Take note, in the last layer's forward pass, of the gradient with which its backward pass begins."""
        self._enter_with_gradient(output, "layers")

    def leave_layers(self, _: Any, arguments: Any) -> None:
        """Take note of the gradient with which the first layer's backward pass ends."""
        self._enter_with_gradient(arguments, "embedding")

    def _enter_with_gradient(self, tensors: Any, part: str) -> None:
        found = next((t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor) and t.requires_grad), None)
        if self.part == "forward" and found is not None:
            found.register_hook(lambda gradient: self.enter(part))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    size = storage.nbytes()
                    self._storages[storage._cdata] = weakref.finalize(storage, self._free, storage._cdata, size)
                    self.now += size
                    self.most[self.part] = max(self.most[self.part], self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        del self._storages[key]
        self.now -= size
