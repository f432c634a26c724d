"""Causal language models of `transformers`: read what others have published, and see what follows from the modules."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging

from stacey_dist.errors import InputError, first_line
from stacey_dist.files import check_regular, read_json
from stacey_dist.models.untrusted_config import without_code, without_network

CAUSAL = "causal_sdpa"
"""transformers' "sdpa" without its mask, which `stacey_dist.training.tasks.attention` registers."""

_INDEX = "model.safetensors.index.json"
# What a model's directory on the hub has that is read here: no pickle, and no code.
_FILES = (
    *("config.json", "*.safetensors", _INDEX),
    *("tokenizer*.json", "tokenizer.model", "sentencepiece.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt"),
)
# Settings that have a token attend to others than all those before it. `max_window_layers` is no such length.
_OTHER_ATTENTION = re.compile(r"(window|window_size|chunk_size)$|bidirectional")
_EAGER_ALONE = re.compile(r"attn.*softcap|alibi")


def model_directory(name: str) -> Path:
    """Return the directory of a published model: a local one, or that of the hub's model of this name, downloaded.

    Raises InputError about `pretrained`.
    """
    return Path(name) if Path(name).is_dir() else _download(name, "pretrained")


@functools.cache
def _download(name: str, argument: str, file: str | None = None) -> Path:
    """Return where a file of the hub's model is, or the directory of all `_FILES`: the hub is asked once in a run.

    Raises InputError, about `argument`.
    """
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(name, file))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client has many kinds
        local = "a directory" if file is None else "a file, a directory"
        raise InputError(
            f"{argument}: {name} is neither {local} nor a model of the hub: {first_line(error)}"
        ) from error


def read_description(name: str) -> dict[str, Any]:
    """Return the configuration of a model, as in transformers' `config.json`, without names of code.

    Args:
        name: the file, a directory that has it, or a name on the Hugging Face hub.

    Raises:
        InputError: about `config`: it is not available, or is not a configuration.
    """
    is_directory = Path(name).is_dir()
    path = Path(name) / "config.json" if is_directory else Path(name)
    if not (is_directory or path.exists() or name.endswith(".json")):
        path = _download(name, "config", "config.json")
    try:
        described = without_code(read_json(path))
        causal_config(described)
    except (OSError, ValueError) as error:
        raise InputError(f"config: {path}: {first_line(error)}") from error
    return dict(described)


def causal_config(described: Any) -> Any:
    """Return the `transformers` configuration of a decoder of text.

    Raises ValueError, in one line, if it describes anything else.
    """
    if not isinstance(described, dict):
        raise ValueError(f"a configuration is a JSON object, not {type(described).__name__}")
    kind = described.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type {kind!a} is not one of transformers {transformers.__version__}, and code that comes with a "
            "model is not run"
        )
    try:
        with without_network():
            config = CONFIG_MAPPING[kind].from_dict(without_code(described))
    except Exception as error:  # of many kinds, as configurations can hold anything
        raise ValueError(first_line(error)) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model_type {kind} is an encoder-decoder; it must be a decoder alone")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_type {kind} is not a causal language model")
    if config.get_text_config() is not config:
        raise ValueError(f"model_type {kind} takes more than text; give the configuration that is its text_config")
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True  # some classes attend to all tokens otherwise
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def new_model(config: Any, attention: str | None = None) -> Any:
    """Return the causal language model of a configuration, with initial weights.

    Args:
        config: as `causal_config` returns it.
        attention: transformers' name of an implementation; None leaves the choice to transformers.

    Raises:
        ValueError: the configuration does not fit together. The message is one line.
    """
    config._attn_implementation = attention
    try:
        with without_network():
            # The class itself: `from_config` would partition the model among the processes of a ZeRO-3 run.
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, ZeroDivisionError) as error:
        raise ValueError(first_line(error)) from error


def attention_of(config: Any, length: int) -> str | None:
    """Return the attention with which a model is right on sequences of `length` tokens, and fastest.

    `CAUSAL` where a token attends to all before it and to nothing else, which needs no mask; else None, transformers'
    own choice with its masks; or "eager", where scores are capped or biased: its other attentions leave that out.
    """
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    active = _active(config)
    if any(_EAGER_ALONE.search(name) for name in active):
        return "eager"
    return CAUSAL if _attends_to_all_before(active, length) and takes_any_mask(made) else None


def attention_spans(config: Any, length: int) -> dict[str, int | None] | None:
    """Return how many tokens a token attends to at most, itself and those before it, in each kind of a model's layers.

    None stands for all in `length` tokens. The whole is None where tokens attend in another way.
    """
    active = _active(config)
    window = active.pop("sliding_window", None)
    active.pop("use_sliding_window", None)
    kinds = set(active.get("layer_types") or ["sliding_attention" if window else "full_attention"])
    plain = _attends_to_all_before(active, length) and not any("alibi" in name for name in active)
    if not plain or not kinds <= {"full_attention", "sliding_attention"}:
        return None
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_flash_attn:  # see `takes_any_mask`
        return None
    spans = {"full_attention": None, "sliding_attention": window if window and window < length else None}
    return {kind: spans[kind] for kind in sorted(kinds)}


def _active(config: Any) -> dict[str, Any]:
    """Return the settings of a configuration that are set and that its class knows.

    A config.json may hold others, such as a window of which the model knows nothing.
    """
    default = _default(config.model_type)
    return {name: value for name, value in config.to_dict().items() if value and hasattr(default, name)}


@functools.cache
def _default(model_type: str) -> Any:
    """Return the default configuration of a `model_type`."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # some defaults do not fit together
    try:
        return CONFIG_MAPPING[model_type]()
    finally:
        logging.set_verbosity(before)


def router_weight(config: Any) -> float | None:
    """Return the weight of a router's balancing loss; None where the configuration does not ask for that loss.

    Raises InputError where it asks for one and its class has none.
    """
    if not getattr(config, "output_router_logits", False):
        return None
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if isinstance(weight := getattr(config, name, None), int | float):
            return float(weight)
    raise InputError(f"output_router_logits: true is not allowed; {config.model_type} has no router_aux_loss_coef")


def _attends_to_all_before(active: dict[str, Any], length: int) -> bool:
    """Return whether no setting among `active` keeps a token from others before it, or shows it later ones."""
    limits = [value for name, value in active.items() if _OTHER_ATTENTION.search(name)]
    return all(type(value) is int and value >= length for value in limits)


def takes_any_mask(made: Any) -> bool:
    """Return whether a model's attention is a function of queries, keys, values and a mask, which may be left out.

    Models that add to the mask themselves, or read it, have no FlashAttention, which takes none.
    """
    return bool(made._supports_sdpa and made._supports_attention_backend and made._supports_flash_attn)


def weight_files(directory: Path) -> list[Path]:
    """Return a model's files of weights.

    Raises InputError, about `pretrained`, unless they are safetensors in this directory.
    """
    try:
        if (directory / _INDEX).exists():
            named = read_json(directory / _INDEX)["weight_map"].values()
            found = sorted({directory / Path(name).name for name in named})
        else:
            found = [directory / "model.safetensors"]
        for file in found:
            check_regular(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"pretrained: {directory} has no safetensors, and other formats of weights are not read: "
            f"{first_line(error)}"
        ) from error
    return found


def experts(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters in which a mixture of experts has one expert's weights after the other."""
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        own = [p for p in module.parameters(recurse=False) if p.shape[:1] == (count,)]
        if any(p.dim() == 3 for p in own):  # a router has a row for each expert
            yield from own
        elif "experts" in name.split("."):  # which does not say how many they are
            yield from (p for p in module.parameters(recurse=False) if p.dim() == 3)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the number of parameters, and of those that a token passes through: fewer in a mixture of experts."""
    total, in_experts = sum(p.numel() for p in model.parameters()), list(experts(model))
    chosen = getattr(model.config, "num_experts_per_tok", None) or getattr(model.config, "moe_topk", None)
    if not in_experts or not isinstance(chosen, int):
        return total, total
    share = min(1.0, chosen / max(p.shape[0] for p in in_experts))
    return total, total - round(sum(p.numel() for p in in_experts) * (1 - share))


def multiplied_parameters(model: Any) -> int:
    """Return the number of parameters that a token is multiplied with: without embeddings that are only looked up."""
    _, active = count_parameters(model)
    output = model.get_output_embeddings()
    tied = None if output is None else output.weight
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not tied}
    return active - sum(table.numel() for table in tables)


def attended(config: Any, context: int) -> int:
    """Return the sum over layers of the heads' width times the tokens that one attends to, in `context` tokens."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0  # as in a state-space model
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if hasattr(config, "qk_nope_head_dim"):  # latent attention: keys and values have widths of their own
        size = (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) // 2

    def setting(name: str) -> Any:  # not of `_active`: the class may have it under another name
        return getattr(config, name, None) if hasattr(_default(config.model_type), name) else None

    seen = {
        "sliding_attention": setting("sliding_window"),
        "chunked_attention": setting("attention_chunk_size"),
        "hybrid_sliding": setting("sliding_window"),
        "local": setting("window_size"),  # of GPT-Neo, which has its own names
        **dict.fromkeys(("linear_attention", "conv", "moe", "mlp"), 0),
    }
    kinds = setting("layer_types") or setting("attention_layers")
    if not kinds:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    spans = [seen.get(kind, context) for kind in kinds]
    return heads * size * sum(context if span is None else min(span, context) for span in spans)


def layer_classes(model: Any) -> tuple[type, ...]:
    """Return the classes of the model's layers, as transformers names them: what FSDP gathers at a time."""
    named = set(model._no_split_modules or ())
    return tuple({type(module) for module in model.modules() if type(module).__name__ in named})
