"""The settings of `train_llm.py` beside the shared ones. The defaults are its quickstart."""

from dataclasses import dataclass, field, fields
from typing import Literal

from stacey_dist.training.config import SHARED_CHANGES, RunConfig
from stacey_dist.training.value_types import AtLeastTwo, FilePath, PositiveFloat, PositiveInt, check


@dataclass
class ModelConfig:
    """The LLaMA to build (transformers' LlamaForCausalLM)."""

    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 344
    """Width inside each feed-forward block."""
    num_hidden_layers: PositiveInt = 4
    """Number of layers."""
    num_attention_heads: PositiveInt = 4
    """Number of attention heads."""
    num_key_value_heads: PositiveInt | None = None
    """Number of key-value heads. None: one for each attention head."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence the model is declared for. None: data.sequence_length."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """Share the input and output embeddings."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights. bfloat16 has no float32 master: for stacey and lp_descent, which round stochastically."""
    attention: Literal["sdpa", "flash_attention_2", "flex", "eager"] = "sdpa"
    """How attention is computed: torch's function for it, the package flash-attn, FlexAttention, or matrix products."""


@dataclass
class DataConfig:
    """What to train on. Without files or dataset: the documentation of Python's standard library."""

    files: list[str] = field(default_factory=list)
    """Files or patterns: JSON lines (.json, .jsonl, also .gz) as C4 has them, .parquet, .txt. Paths are literal."""
    validation_files: list[str] = field(default_factory=list)
    """Files or patterns to evaluate on. Empty: documents held out of the training data."""
    dataset: str | None = None
    """A dataset on the Hugging Face hub, as in allenai/c4."""
    dataset_config: str | None = None
    """The dataset's configuration, as in en."""
    dataset_split: str = "train"
    """The split to train on."""
    dataset_validation_split: str | None = "validation"
    """The split to evaluate on. null: documents held out of the training data."""
    streaming: bool = True
    """Read the hub's dataset while it arrives, instead of downloading all of it first."""
    text_column: str = "text"
    """The column or key that holds a document's text."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What a line or row without a valid text does: end the preparation, or be left out, counted and named."""
    sequence_length: PositiveInt = 128
    """Tokens of one training sequence."""
    document_mask: bool = False
    """Tokens attend within their document alone, and positions restart at each document."""
    max_tokens: PositiveInt | None = None
    """Training tokens to prepare at most. None: all."""
    validation_every: AtLeastTwo = 50
    """Without a validation set, one document in this many is held out."""
    cache_dir: FilePath | None = None
    """Where tokenized data is kept, for all runs. None: run_dir/data."""


@dataclass
class TokenizerConfig:
    """The tokenizer: a sentencepiece model, a hub tokenizer, or one trained on the data."""

    name: str | None = None
    """A tokenizer on the Hugging Face hub, or a directory that AutoTokenizer loads."""
    file: str | None = None
    """A sentencepiece .model file."""
    vocab_size: PositiveInt = 2048
    """Without name and file, a sentencepiece BPE model of this size is trained on the data."""


@dataclass
class LLMConfig(RunConfig):
    """Pretrain a LLaMA with STACEY."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    samples = "sequences"
    changes_to_allow = (
        *SHARED_CHANGES,
        *(f"model.{f.name}" for f in fields(ModelConfig) if f.name not in ("max_position_embeddings", "attention")),
        "data.sequence_length",
        "data.document_mask",
    )

    def check_rules(self) -> None:
        """Raise SettingsError for values that do not go together."""
        super().check_rules()
        _check_model(self)
        data, tokenizer = self.data, self.tokenizer
        check(
            not (data.files and data.dataset),
            "data.dataset",
            data.dataset,
            "give either data.files or data.dataset, not both (--data.dataset null)",
        )
        check(
            bool(data.files) or not data.validation_files,
            "data.validation_files",
            data.validation_files,
            "it goes with data.files",
        )
        check(
            not (tokenizer.name and tokenizer.file),
            "tokenizer.file",
            tokenizer.file,
            "give either tokenizer.name or tokenizer.file, not both",
        )

    @property
    def weights_dtype(self) -> str:
        """The dtype of the weights before the engine casts them."""
        return self.model.dtype

    def layer_classes(self) -> set[str]:
        """Return the names of the classes of the model's layers."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
                )
            )
        return {type(module).__name__ for module in model.modules()}


def _check_model(config: LLMConfig) -> None:
    model = config.model
    heads, hidden = model.num_attention_heads, model.hidden_size
    check(
        hidden % heads == 0,
        "model.num_attention_heads",
        heads,
        f"it must divide model.hidden_size = {hidden}",
    )
    check(
        hidden // heads % 2 == 0,
        "model.num_attention_heads",
        heads,
        f"model.hidden_size / model.num_attention_heads = {hidden // heads} must be even, for rotary embeddings",
    )
    groups = model.num_key_value_heads
    check(
        groups is None or heads % groups == 0,
        "model.num_key_value_heads",
        groups,
        f"it must divide model.num_attention_heads = {heads}",
    )
    longest, length = model.max_position_embeddings, config.data.sequence_length
    check(
        longest is None or longest >= length,
        "model.max_position_embeddings",
        longest,
        f"it must be at least data.sequence_length = {length}",
    )
    name = config.optimizer.name
    check(
        model.dtype == "float32" or name in ("stacey", "lp_descent"),
        "model.dtype",
        model.dtype,
        f"optimizer.name = {name} rounds bfloat16 weights to nearest, which loses its updates; "
        "use float32 with train.mixed_precision bf16, or stacey",
    )
    check(
        model.dtype == "float32" or config.train.mixed_precision != "fp16",
        "train.mixed_precision",
        "fp16",
        f"it needs model.dtype float32, not {model.dtype}",
    )
