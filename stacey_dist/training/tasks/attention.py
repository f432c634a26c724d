"""Attention of a language model: `model.attention` and `data.document_mask`.

transformers makes a mask in each forward pass. To find out whether one is needed, and whether positions restart, the
host waits for the device. To avoid this, a mask is an argument of the forward pass here. It is made from numbers that
the thread that reads ahead has computed (`stacey_dist.data.documents`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stacey_dist.data import documents
from stacey_dist.errors import SettingsError, first_line
from stacey_dist.models.causal_lm import CAUSAL, attention_of, attention_spans, takes_any_mask
from stacey_dist.training.run import Run
from stacey_dist.training.settings.llm_config import LLMConfig
from stacey_dist.training.settings.value_types import check

_VARLEN = "causal_varlen"
"""The name of `_flash_attention` for transformers, which makes no masks for attentions that it does not know."""
_FLEX = "flex_attention"
# What a class of transformers has where it can attend so.
_SUPPORT = {"flash_attention_2": "_supports_flash_attn", "flex": "_supports_flex_attn"}
_FOR_LAYERS = "attention_mask_of_layers"
_SMALLEST_FLEX_HEAD = 16
"""Numbers in a head, of which FlexAttention's kernels need this many."""


def _flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    cu_seq_lens: Tensor | None = None,
    span: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend within documents, as transformers' `AttentionInterface` calls it.

    Queries, keys and values are of shape (windows, heads, length, head size), the output is of shape
    (windows, length, heads, head size).

    transformers' own function would look at the positions, and wait for the device, in every layer.

    `span` is the sliding window of all layers, 0 for none; None where layers differ. A module's own argument may lack a
    window that it has, or be of a setting that its model does not have.
    """
    if cu_seq_lens is None:
        allowed = f"{type(module).__name__} is not told where documents end; use sdpa or eager"
        raise SettingsError(f"model.attention: flash_attention_2 is not allowed; {allowed}")
    if span is None:
        window = getattr(module, "sliding_window", None) if sliding_window is None else sliding_window
    else:
        window = span or None
    from flash_attn import flash_attn_varlen_func

    for name in ("s_aux", "softcap", "position_bias"):
        if unused.get(name) is not None:
            raise NotImplementedError(f"{name} of {type(module).__name__}")
    windows, _, length, _ = query.shape
    kind = query.device.type
    # Rotations have made queries and keys float32 where autocast keeps the residual stream so.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    output = flash_attn_varlen_func(
        *(tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value)),
        cu_seq_lens,
        cu_seq_lens,
        length,
        length,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return output.unflatten(0, (windows, length)), None


AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionInterface.register(_VARLEN, _flash_attention)


def _take_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a decoder the mask of its layers, as a forward pre-hook."""
    if _FOR_LAYERS in kwargs:
        mask = kwargs.pop(_FOR_LAYERS)
        kwargs = {**kwargs, "attention_mask": mask}
    return args, kwargs


def check_attention(run: Run[LLMConfig]) -> None:
    """Raise SettingsError where `model.attention` is not available on the run's device, or in its precision."""
    name, device = run.config.model.attention, run.accelerator.device.type
    if name == "flex":
        check(device == "cuda", "model.attention", name, "torch's FlexAttention has a backward pass on GPUs only")
    if name != "flash_attention_2":
        return
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # it may be there and not fit torch
        line = first_line(error)
        allowed = f"flash_attn cannot be imported ({line}); pip install flash-attn --no-build-isolation, or use sdpa"
        raise SettingsError(f"model.attention: {name} is not allowed; {allowed}") from error
    check(device == "cuda", "model.attention", name, f"it runs on GPUs, not on {device}")
    low = run.config.model.dtype == "bfloat16" or run.accelerator.mixed_precision in ("bf16", "fp16")
    check(low, "model.attention", name, "it computes in bfloat16 or float16; use --train.mixed_precision bf16, or sdpa")


def implementation(config: LLMConfig, model_config: Any) -> str | None:
    """Return transformers' name for the attention of the model to build; None leaves the choice to transformers.

    `sdpa` gives another attention if the model needs one, such as eager attention to cap scores.

    Raises SettingsError if transformers' model cannot attend as `model.attention` says.
    """
    name, length = config.model.attention, config.data.sequence_length
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    own, known = attention_of(model_config, length), attention_spans(model_config, length) is not None
    if name == "sdpa":
        return CAUSAL if own is None and known and takes_any_mask(made) else own
    if name == "eager":
        return "eager"
    able = own != "eager" and made._supports_attention_backend and getattr(made, _SUPPORT[name], False)
    if name == "flash_attention_2":  # kernels of its own, as for sinks; values of another width than keys
        able = able and not getattr(made, "_compatible_flash_implementations", None)
        able = able and not getattr(model_config, "v_head_dim", None)
    check(able, "model.attention", name, f"transformers' {made.__name__} has none; use sdpa or eager")
    if name == "flash_attention_2":
        return _VARLEN if known else name
    dropout = [getattr(model_config, each, 0.0) or 0.0 for each in ("attention_dropout", "attn_pdrop")]
    check(not any(dropout), "model.attention", name, "transformers' FlexAttention has no dropout, and the model has")
    size = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    allowed = f"an attention head has {size} numbers, and FlexAttention needs at least {_SMALLEST_FLEX_HEAD}"
    check(size >= _SMALLEST_FLEX_HEAD, "model.attention", name, allowed)
    return _FLEX


class Attention:
    """Make the arguments of a language model's forward pass besides the tokens: positions and masks.

    Args:
        config: of the run.
        model: the model, built as `implementation` says.
        end_token_id: the id that ends a document.

    Raises:
        SettingsError: `data.document_mask` is set, and the model has layers that cannot keep documents apart.
    """

    def __init__(self, config: LLMConfig, model: Any, end_token_id: int) -> None:
        self.length = config.data.sequence_length
        self._end_token_id = end_token_id if config.data.document_mask else None
        self._how = model.config._attn_implementation
        has_masks = self._how in (CAUSAL, _VARLEN, _FLEX) or (
            self._how == "eager" and model._supports_attention_backend
        )
        spans = attention_spans(model.config, self.length) if has_masks else None
        if config.data.document_mask and (spans is None or model._is_stateful):
            raise SettingsError(
                f"data.document_mask: true is not allowed; documents cannot be kept apart in {type(model).__name__}, "
                "whose layers attend in other ways"
            )
        spans = spans or {}
        different = len(set(spans.values())) > 1
        self._spans = spans if different else dict(list(spans.items())[:1])
        plain = not config.data.document_mask and not any(spans.values())
        # Causal attention over whole windows is what torch's function does by itself.
        self._is_given = bool(spans) and not (self._how == CAUSAL and plain)
        self._name = "attention_mask"
        if self._is_given and getattr(model.config, "output_router_logits", False):
            # The loss of a router takes an `attention_mask` for one of padding: the layers get theirs past it.
            self._name = _FOR_LAYERS
            model.base_model.register_forward_pre_hook(_take_mask, with_kwargs=True)

    def numbers(self, inputs: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Return what `arguments` needs to know of windows, on the host.

        Args:
            inputs: the tokens, of shape (windows, length).
        """
        if not self._is_given:
            return ()
        places = documents.positions(inputs, self._end_token_id)
        if self._how == _VARLEN:
            return places, documents.boundaries(places)
        firsts = [documents.first_attended(places, most) for most in self._spans.values()]
        if self._how == _FLEX:
            return places, *chain.from_iterable((first, *documents.blocks(first)) for first in firsts)
        return places, *firsts

    def arguments(self, numbers: tuple[Tensor, ...]) -> dict[str, Any]:
        """Return arguments of the forward pass, from the numbers of its windows on the device. The host does not wait.

        They are positions that restart at each document, and what keeps it from the others: a mask for each kind of
        layers, or the boundaries of documents.
        """
        if not numbers:
            return {}
        places, *others = numbers
        given: dict[str, Any] = {"position_ids": places}  # a model that is not given them may count a mask's rows
        if self._how == _VARLEN:
            span = next(iter(self._spans.values())) or 0 if len(self._spans) == 1 else None
            return {**given, "cu_seq_lens": others[0], "span": span}
        count = len(others) // len(self._spans)
        masks = [self._mask(*others[start : start + count]) for start in range(0, len(others), count)]
        mask = masks[0] if len(masks) == 1 else dict(zip(self._spans, masks, strict=True))
        return {**given, self._name: mask}

    def _mask(self, first: Tensor, *blocks: Tensor) -> Any:
        """Return a mask of windows: of shape (windows, 1, length, length), or in blocks."""
        if self._how == _FLEX:
            from torch.nn.attention.flex_attention import BlockMask

            def attends(window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key <= query) & (key >= first[window, query])

            in_part, columns_in_part, whole, columns_whole = blocks
            return BlockMask.from_kv_blocks(
                in_part,
                columns_in_part,
                whole,
                columns_whole,
                BLOCK_SIZE=documents.BLOCK,
                mask_mod=attends,
                seq_lengths=(self.length, self.length),
            )
        index = torch.arange(self.length, device=first.device)
        mask = (index <= index[:, None]) & (index >= first[:, None, :, None])
        # Each token attends to itself at least, so that no row is -inf alone.
        return mask if self._how == CAUSAL else torch.zeros((), device=mask.device).where(mask, -torch.inf)


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Have a model attend as transformers does by itself while it generates: with a cache, and masks of its own."""
    before = model.config._attn_implementation
    if before in (CAUSAL, _VARLEN, _FLEX):
        model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before
