"""The model that is planned, of any architecture, as its own modules say it, without memory for its weights."""

import json
import math
from dataclasses import dataclass
from typing import Any

from stacey_dist.errors import SettingsError
from stacey_dist.training.reports.flops import flops_per_token
from stacey_dist.training.settings.llm_config import LLMConfig, check_length, described_llama, described_model

# Sizes of vocabularies by the tokenizer's name on the hub, so that a plan needs no download.
VOCABULARIES = {"t5-base": 32_100, "hf-internal-testing/llama-tokenizer": 32_000}


@dataclass(frozen=True)
class Parameter:
    """A parameter's name in the model and its shape: (rows, columns), or (rows,) for a norm."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A causal language model of transformers.

    Attributes:
        name: its class; of the LLaMA of the settings' numbers "LLaMA".
        of_numbers: whether it is that one, for whose activations there are formulas.
        described: its configuration, as in a config.json.
        parameters: all of them in the order of `model.parameters()`, a tied one once.
        embedding: the input embedding's, in a list of its own, unless it is tied.
        layers: those of each layer.
        tail: the others.
        active: how many parameters a token passes through: fewer than there are, in a mixture of experts.
        in_experts: how many are an expert's.
        head: elements of the output matrix.
        flops_per_token: operations of forward and backward on a token, as in the MFU of `train_llm.py`.
    """

    name: str
    of_numbers: bool
    described: str
    parameters: list[Parameter]
    embedding: list[list[Parameter]]
    layers: list[list[Parameter]]
    tail: list[Parameter]
    active: int
    in_experts: int
    head: int
    flops_per_token: float

    @property
    def elements(self) -> int:
        """The number of parameters."""
        return sum(p.elements for p in self.parameters)

    @property
    def units(self) -> list[list[Parameter]]:
        """Parameters that Accelerate's FSDP2 gathers together: the embedding (unless tied), each layer, the rest."""
        return [*self.embedding, *self.layers, self.tail]


def planned_model(config: LLMConfig, vocabulary: int | None = None) -> Model:
    """Return the model of a configuration, with `vocabulary` tokens if that is given.

    Raises SettingsError if it cannot be read, or does not fit together; or as `_vocabulary_size`.
    """
    described = described_model(config.model)
    length = config.data.sequence_length
    if described is None:
        return make_model(described_llama(config, _vocabulary_size(config, vocabulary)), length, of_numbers=True)
    if config.model.embeddings == "new":
        vocabulary = _vocabulary_size(config, vocabulary)
    if vocabulary is not None:
        described["vocab_size"] = vocabulary
    try:
        planned = make_model(described, length)
    except ValueError as error:
        source = config.model.source
        raise SettingsError(f"model.{source}: {getattr(config.model, str(source))}: {error}") from error
    check_length(config, described)
    return planned


def make_model(described: dict[str, Any], length: int, *, of_numbers: bool = False) -> Model:
    """Return the model of a config.json, on sequences of `length` tokens. Raises ValueError if it does not fit."""
    import torch
    from transformers.initialization import no_init_weights

    from stacey_dist.models import causal_lm

    with torch.device("meta"), no_init_weights():
        model = causal_lm.new_model(causal_lm.causal_config(described))
    model.tie_weights()
    left = {param: Parameter(name, tuple(param.shape)) for name, param in model.named_parameters()}
    everything = list(left.values())

    def taken(module: Any) -> list[Parameter]:
        return [left.pop(param) for param in module.parameters() if param in left]

    output = model.get_output_embeddings()
    tied = output is None or output.weight is model.get_input_embeddings().weight
    embedding = [] if tied else [taken(model.get_input_embeddings())]
    classes = causal_lm.layer_classes(model)
    layers = [taken(module) for module in model.modules() if isinstance(module, classes)]
    _, active = causal_lm.count_parameters(model)
    attended = causal_lm.attended(model.config, length)
    return Model(
        name="LLaMA" if of_numbers else type(model).__name__,
        of_numbers=of_numbers,
        described=json.dumps(described, sort_keys=True),
        parameters=everything,
        embedding=embedding,
        layers=layers,
        tail=list(left.values()),
        active=active,
        in_experts=sum(p.numel() for p in causal_lm.experts(model)),
        head=0 if output is None else math.prod(output.weight.shape),
        flops_per_token=flops_per_token(causal_lm.multiplied_parameters(model), attended),
    )


def _vocabulary_size(config: LLMConfig, vocabulary: int | None) -> int:
    """Return how many tokens the configured tokenizer has, `vocabulary` if that is given.

    Raises SettingsError if that is not known without loading it.
    """
    tokenizer = config.tokenizer
    if vocabulary is None and (tokenizer.name or tokenizer.file):
        vocabulary = VOCABULARIES.get(tokenizer.name or "")
        if vocabulary is None:
            raise SettingsError(
                f"tokenizer: the vocabulary of {tokenizer.name or tokenizer.file} is not known without loading it; "
                "say its size with --vocab-size"
            )
    return tokenizer.vocab_size if vocabulary is None else vocabulary
