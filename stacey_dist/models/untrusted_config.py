"""Build models of `transformers` and `stacey_dist` from configurations that others have written.

A configuration can name code to import and kernels to download. These names are left out, and the classes are those of
the two packages.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub import constants

from stacey_dist import models
from stacey_dist.errors import first_line

# Names of code, kernels and quantizers, each of which transformers would import or fetch.
_LEFT_OUT = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "compression_config",
    "custom_pipelines",
    "experts_implementation",
    "kernel_config",
    "quantization_config",
    "use_kernels",
}
# Building a model takes time for each module: a configuration with 10^12 layers would never end.
_COUNT = re.compile(r"layer|block|depth|stage|expert")
_MOST_MODULES = 100_000


def model_class(name: Any) -> Any:
    """Return the model of transformers or stacey_dist that has this name; None if it is of neither."""
    if not isinstance(name, str) or not name.isidentifier():
        return None
    for package, home in ((transformers, "transformers.models."), (models, "stacey_dist.models.")):
        found = getattr(package, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found if found.__module__.startswith(home) and found.__name__ == name else None
    return None


def build_shell(described: Any, name: Any = None) -> Any:
    """Return the model of a configuration, without memory for its weights.

    Args:
        described: the configuration, as in transformers' `config.json`.
        name: the model's class. Without one it is the first that the configuration names, or transformers' causal
            language model.

    Raises:
        ValueError: there is no such model, or the configuration does not fit it. The message is one line.
    """
    if not isinstance(described, dict):
        raise ValueError(f"a configuration is a JSON object, not {type(described).__name__}")
    try:
        with without_network(), torch.device("meta"):
            model = _build(without_code(described), name)
            model.tie_weights()  # older versions of transformers leave them untied on meta
        return model
    except Exception as error:  # of many kinds, as configurations can hold anything
        raise ValueError(first_line(error)) from error


def _build(described: dict[str, Any], name: Any) -> Any:
    if name is None:
        named = described.get("architectures")
        name = named[0] if isinstance(named, list) and named else None
    # The class itself: `from_config` would partition the model among the processes of a ZeRO-3 run.
    if made := model_class(name):
        config = made.config_class.from_dict(described)
        if hasattr(config, "use_cache"):
            config.use_cache = True
        return made(config)
    kind = described.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{name or kind!a} is not a model of transformers or stacey_dist, and code that comes with a model is not "
            "run"
        )
    config = transformers.CONFIG_MAPPING[kind].from_dict(described)
    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def without_code(value: Any) -> Any:
    """Return a configuration without names of code, kernels and quantizers, at every level of it.

    Raises ValueError for a count of layers or experts that would never end.
    """
    if isinstance(value, list):
        return [without_code(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    for key, inner in value.items():
        if isinstance(key, str) and _COUNT.search(key):
            counts = [count for count in (inner if isinstance(inner, list) else [inner]) if type(count) is int]
            if sum(counts) > _MOST_MODULES:
                raise ValueError(f"{key}: {sum(counts)} is more than {_MOST_MODULES}")
    return {key: without_code(inner) for key, inner in value.items() if key not in _LEFT_OUT}


@contextmanager
def without_network() -> Iterator[None]:
    """Keep huggingface_hub from downloading: some models would fetch parts that their configurations name."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
