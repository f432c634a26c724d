"""The LLaMA that is planned: its parameters in the order and groups that the engines see, and its arithmetic."""

import math
from dataclasses import dataclass

from stacey_dist.errors import SettingsError
from stacey_dist.training.reports.flops import flops_per_token
from stacey_dist.training.settings.llm_config import LLMConfig

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


def grouped(parameters: list[Parameter], decay_norms: bool) -> list[list[Parameter]]:
    """Return the optimizer's groups: with weight decay, and (norms and biases, unless they decay too) without."""
    matrices = [p for p in parameters if len(p.shape) > 1 or decay_norms]
    norms = [p for p in parameters if len(p.shape) == 1 and not decay_norms]
    return [matrices, norms] if norms else [matrices]


@dataclass(frozen=True)
class Llama:
    """Shape of a `LlamaForCausalLM` as `stacey_dist.training.tasks.llm_model.build_model` makes it."""

    name = "LLaMA"
    in_experts = 0
    """Parameters that are an expert's."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    tied: bool

    @property
    def head_size(self) -> int:
        """Elements of an attention head."""
        return self.hidden // self.heads

    @property
    def embedding(self) -> Parameter:
        """The input embedding; also the output matrix where they are tied."""
        return Parameter("model.embed_tokens.weight", (self.vocabulary, self.hidden))

    @property
    def tail(self) -> list[Parameter]:
        """The last norm and the output matrix, which FSDP2 gathers together; of a tied model, the embedding too."""
        norm = Parameter("model.norm.weight", (self.hidden,))
        if self.tied:
            return [norm, self.embedding]
        return [norm, Parameter("lm_head.weight", (self.vocabulary, self.hidden))]

    def layer(self, index: int = 0) -> list[Parameter]:
        """Return the parameters of a layer."""
        hidden, wide, keys = self.hidden, self.intermediate, self.key_value_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        return [Parameter(f"model.layers.{index}.{name}.weight", shape) for name, shape in shapes.items()]

    @property
    def units(self) -> list[list[Parameter]]:
        """Parameters that Accelerate's FSDP2 gathers together: the embedding (unless tied), each layer, the tail."""
        first = [] if self.tied else [[self.embedding]]
        return [*first, *(self.layer(index) for index in range(self.layers)), self.tail]

    @property
    def parameters(self) -> list[Parameter]:
        """All of them in the order of `model.parameters()`, a tied one once."""
        layers = [parameter for index in range(self.layers) for parameter in self.layer(index)]
        last = self.tail[:1] if self.tied else self.tail
        return [self.embedding, *layers, *last]

    def groups(self, *, decay_norms: bool) -> list[list[Parameter]]:
        """Return the optimizer's groups, see `grouped`."""
        return grouped(self.parameters, decay_norms)

    @property
    def head(self) -> int:
        """Elements of the output matrix."""
        return self.vocabulary * self.hidden

    @property
    def elements(self) -> int:
        """The number of parameters."""
        return sum(p.elements for p in self.parameters)

    @property
    def active(self) -> int:
        """Those that a token passes through: all."""
        return self.elements

    @property
    def matrix_elements(self) -> int:
        """Those that a token is multiplied with: all but the embedding's look-up and the norms."""
        layers = self.layers * sum(p.elements for p in self.layer() if len(p.shape) > 1)
        return layers + self.vocabulary * self.hidden

    def flops_per_token(self, length: int) -> float:
        """Return the floating-point operations of forward and backward on a token, as in the MFU of `train_llm.py`."""
        weights = self.elements - (0 if self.tied else self.embedding.elements)
        return flops_per_token(weights, self.layers * self.hidden * length)


def llama(config: LLMConfig, vocabulary: int | None = None) -> Llama:
    """Return the LLaMA of a configuration. Raises SettingsError as `vocabulary_size` does."""
    model = config.model
    return Llama(
        vocabulary=vocabulary_size(config, vocabulary),
        hidden=model.hidden_size,
        intermediate=model.intermediate_size,
        layers=model.num_hidden_layers,
        heads=model.num_attention_heads,
        key_value_heads=model.num_key_value_heads or model.num_attention_heads,
        tied=model.tie_word_embeddings,
    )


def vocabulary_size(config: LLMConfig, vocabulary: int | None = None) -> int:
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
