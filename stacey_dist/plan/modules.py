"""A planned model of any architecture, as its own modules say it, without memory for its weights."""

import json
import math
from dataclasses import dataclass
from typing import Any

from stacey_dist.errors import SettingsError
from stacey_dist.plan.model import Llama, Parameter, grouped, llama, vocabulary_size
from stacey_dist.training.reports.flops import flops_per_token
from stacey_dist.training.settings.llm_config import LLMConfig, check_length, described_model


@dataclass(frozen=True)
class Modules:
    """A causal language model of transformers.

    Attributes:
        described: its configuration, as in a config.json.
        name: its class.
        parameters: all of them in the order of `model.parameters()`, a tied one once.
        embedding: the input embedding's, in a list of its own, unless it is tied.
        layers: those of each layer.
        tail: the others.
        active: how many parameters a token passes through: fewer than there are, in a mixture of experts.
        in_experts: how many are an expert's.
        multiplied: how many a token is multiplied with.
        head: elements of the output matrix.
    """

    described: str
    name: str
    parameters: list[Parameter]
    embedding: list[list[Parameter]]
    layers: list[list[Parameter]]
    tail: list[Parameter]
    active: int
    in_experts: int
    multiplied: int
    head: int

    @property
    def elements(self) -> int:
        """The number of parameters."""
        return sum(p.elements for p in self.parameters)

    @property
    def units(self) -> list[list[Parameter]]:
        """Parameters that Accelerate's FSDP2 gathers together: the embedding (unless tied), each layer, the rest."""
        return [*self.embedding, *self.layers, self.tail]

    def layer(self) -> list[Parameter]:
        """Return the parameters of the largest layer."""
        return max(self.layers or [self.tail], key=lambda unit: sum(p.elements for p in unit))

    def groups(self, *, decay_norms: bool) -> list[list[Parameter]]:
        """Return the optimizer's groups, see `grouped`."""
        return grouped(self.parameters, decay_norms)

    def flops_per_token(self, length: int) -> float:
        """Return the floating-point operations of forward and backward on a token, as in the MFU of `train_llm.py`."""
        from stacey_dist.models.causal_lm import attended, causal_config

        return flops_per_token(self.multiplied, attended(causal_config(json.loads(self.described)), length))


def planned_model(config: LLMConfig, vocabulary: int | None = None) -> Llama | Modules:
    """Return the model of a configuration, with `vocabulary` tokens if that is given.

    Raises SettingsError if it cannot be read, or does not fit together.
    """
    described = described_model(config.model)
    if described is None:
        return llama(config, vocabulary)
    if config.model.embeddings == "new":
        vocabulary = vocabulary_size(config, vocabulary)
    if vocabulary is not None:
        described["vocab_size"] = vocabulary
    try:
        planned = modules(described)
    except ValueError as error:
        setting = "config" if config.model.config else "pretrained"
        raise SettingsError(f"model.{setting}: {getattr(config.model, setting)}: {error}") from error
    check_length(config, described)
    return planned


def modules(described: dict[str, Any]) -> Modules:
    """Return the model of a configuration. Raises ValueError if it does not fit together."""
    import torch
    from transformers.initialization import no_init_weights

    from stacey_dist.models import causal_lm

    with torch.device("meta"), no_init_weights():
        model = causal_lm.new_model(causal_lm.causal_config(described))
    model.tie_weights()
    names = {param: name for name, param in model.named_parameters()}

    def parameters(found: Any) -> list[Parameter]:
        return [Parameter(names[param], tuple(param.shape)) for param in dict.fromkeys(found) if param in left]

    def taken(module: Any) -> list[Parameter]:
        own = list(module.parameters())
        found = parameters(own)
        for param in own:
            left.pop(param, None)
        return found

    left = dict.fromkeys(model.parameters())
    everything = parameters(left)
    output = model.get_output_embeddings()
    tied = output is None or output.weight is model.get_input_embeddings().weight
    embedding = [] if tied else [taken(model.get_input_embeddings())]
    classes = causal_lm.layer_classes(model)
    layers = [taken(module) for module in model.modules() if isinstance(module, classes)]
    _, active = causal_lm.count_parameters(model)
    return Modules(
        described=json.dumps(described, sort_keys=True),
        name=type(model).__name__,
        parameters=everything,
        embedding=embedding,
        layers=layers,
        tail=parameters(left),
        active=active,
        in_experts=sum(p.numel() for p in causal_lm.experts(model)),
        multiplied=causal_lm.multiplied_parameters(model),
        head=0 if output is None else math.prod(output.weight.shape),
    )
