"""The settings that only `train_llm.py` has. The defaults are those of its quickstart."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from stacey_dist.errors import settings_errors
from stacey_dist.training.settings.config import SHARED_CHANGES, RunConfig, TrackingConfig, TrainConfig
from stacey_dist.training.settings.value_types import (
    AtLeastTwo,
    FilePath,
    NonEmptyPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check,
)


@dataclass
class ModelConfig:
    """The model: a LLaMA of these sizes (transformers' LlamaForCausalLM), another architecture, or pretrained
    weights."""

    config: FilePath | None = None
    """Initialize this architecture: a transformers config.json, a directory that has one, or a name on the hub. It sets
    all settings below except dtype and attention."""
    pretrained: FilePath | None = None
    """Continue from these weights: a directory with a config.json and safetensors, or a name on the hub. It comes with
    its tokenizer, unless `embeddings` is set."""
    embeddings: Literal["keep", "new"] | None = None
    """For pretrained with another tokenizer. keep: keep the embeddings, because ids mean the same tokens. new:
    initialize embeddings for the tokenizer that is named, or trained on the data."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 344
    """Width inside each feed-forward block."""
    num_hidden_layers: PositiveInt = 4
    """Number of layers."""
    num_attention_heads: PositiveInt = 4
    """Number of attention heads."""
    num_key_value_heads: PositiveInt | None = None
    """Number of key-value heads. null: one for each attention head."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence in the model's configuration. null: data.sequence_length."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """Share the input and output embeddings."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights. bfloat16 has no float32 master weights, so it needs stacey or lp_descent, which round
    stochastically."""
    attention: Literal["sdpa", "flash_attention_2", "flex", "eager"] = "sdpa"
    """Implementation of attention: torch's scaled_dot_product_attention, the package flash-attn, FlexAttention, or
    matrix products."""

    def __post_init__(self) -> None:
        """Take an empty name, as of a shell's variable that is not set, for one that is not given."""
        self.config, self.pretrained = self.config or None, self.pretrained or None

    @property
    def source(self) -> Literal["config", "pretrained"] | None:
        """The setting that names another model than the LLaMA of the numbers; None where there is none."""
        if self.config is not None:
            return "config"
        return None if self.pretrained is None else "pretrained"


@dataclass
class CorpusConfig:
    """Documents, from files or from a dataset."""

    files: list[str] = field(default_factory=list)
    """Files or patterns: JSON lines as in C4 (.json, .jsonl, also .gz), .parquet, .txt. An existing path is taken
    literally."""
    validation_files: list[str] = field(default_factory=list)
    """Files or patterns to evaluate on. Empty: documents are held out of the training data."""
    dataset: str | None = None
    """A dataset on the Hugging Face hub, as in allenai/c4."""
    dataset_config: str | None = None
    """The dataset's configuration, as in en."""
    dataset_split: str = "train"
    """The split to train on."""
    dataset_validation_split: str | None = "validation"
    """The split to evaluate on. null: documents are held out of the training data."""
    streaming: bool = True
    """Stream the hub's dataset instead of downloading all of it first."""
    text_column: str = "text"
    """The column or key that holds a document's text."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Handling of a line or row without valid text. error: stop the run. skip: skip, count and report it."""
    max_tokens: PositiveInt | None = None
    """Largest number of training tokens to prepare. null: all. Of a separate validation set, max_tokens /
    validation_every tokens are prepared then, or 2^20 if that is more."""
    validation_every: AtLeastTwo = 50
    """If there is no validation set, one document in this many is held out."""


@dataclass
class SourceConfig(CorpusConfig):
    """One source of a mixture."""

    weight: PositiveFloat = 1.0
    """The source's share of the training sequences, relative to the other weights."""
    name: str | None = None
    """The source's name in reports: letters, digits, _ and -. null: the name of its first file or its dataset."""

    @property
    def label(self) -> str:
        """The name, or what stands for it."""
        path = Path(self.dataset or (self.files or [""])[0])
        words = [re.search(r"[A-Za-z0-9_-]+", text) for text in (path.name.split(".")[0], path.parent.name)]
        return next((word[0].strip("-_") for word in words if word), "") if self.name is None else self.name


@dataclass
class DataConfig(CorpusConfig):
    """The training data. If no files, dataset or sources are set: the documentation of Python's standard library."""

    sources: list[SourceConfig] = field(default_factory=list)
    """A mixture, as in '[{files: [a.jsonl], weight: 0.7}, {files: [b.txt], weight: 0.3}]'. Each source has a weight, a
    name, and its own values of the settings above."""
    sequence_length: PositiveInt = 128
    """Number of tokens in a training sequence."""
    document_mask: bool = False
    """Tokens attend only within their document, and positions restart at each document."""
    cache_dir: FilePath | None = None
    """Directory of tokenized data, which runs can share. null: run_dir/data."""

    def corpora(self) -> dict[str, CorpusConfig]:
        """Return what is read, under what the names of its settings begin with."""
        return {f"data.sources[{i}].": each for i, each in enumerate(self.sources)} or {"data.": self}


@dataclass
class TokenizerConfig:
    """The tokenizer: a sentencepiece model, a hub tokenizer, or one trained on the data."""

    name: str | None = None
    """A tokenizer on the Hugging Face hub, or a directory that AutoTokenizer loads."""
    file: str | None = None
    """A sentencepiece .model file."""
    vocab_size: PositiveInt = 2048
    """If neither name nor file is set, a sentencepiece BPE model of this size is trained on the data."""


@dataclass
class LLMTrainConfig(TrainConfig):
    """Length, batches, precision, logging and evaluation."""

    eval_sequences: PositiveInt | None = None
    """Held-out sequences of each source that an evaluation looks at, the first ones. null: all."""


@dataclass
class LLMTrackingConfig(TrackingConfig):
    """Experiment trackers, through Accelerate, and what else to record."""

    sample_tokens: NonNegativeInt = 24
    """Number of tokens to generate from a held-out text after each evaluation, for the log and trackers. 0: none."""


@dataclass
class LLMConfig(RunConfig):
    """Pretrain a LLaMA with STACEY."""

    run_dir: NonEmptyPath = "runs/quickstart"
    """Directory of the run: configuration, metrics, plots, checkpoints and the exported model."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: LLMTrainConfig = field(default_factory=LLMTrainConfig)
    tracking: LLMTrackingConfig = field(default_factory=LLMTrackingConfig)

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
        for prefix, corpus in self.data.corpora().items():
            _check_corpus(corpus, prefix)
        _check_sources(self.data)
        both = self.tokenizer.name and self.tokenizer.file
        self.require(not both, "tokenizer.file", "give either tokenizer.name or tokenizer.file, not both")

    @property
    def weights_dtype(self) -> str:
        """The dtype of the weights before the engine casts them."""
        return self.model.dtype

    def layer_classes(self) -> set[str]:
        """Return the names of the classes of the model's layers. Raises SettingsError as `described_model` does."""
        import torch

        from stacey_dist.models.causal_lm import causal_config, new_model

        described = described_model(self.model) or {"model_type": "llama", "num_hidden_layers": 1}
        with torch.device("meta"):
            model = new_model(causal_config(described))
        return {type(module).__name__ for module in model.modules()}


def described_model(model: ModelConfig) -> dict[str, Any] | None:
    """Return what `model.config` or `model.pretrained` holds, as in a config.json; None for a LLaMA of numbers.

    Raises SettingsError if it cannot be read, or is not of a causal language model.
    """
    if model.source is None:
        return None
    from stacey_dist.models.causal_lm import read_description

    with settings_errors({"config": f"model.{model.source}"}):
        return read_description(getattr(model, model.source))


def described_llama(config: LLMConfig, vocab_size: int) -> dict[str, Any]:
    """Return the LLaMA of the configured numbers, as in a config.json."""
    model = config.model
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings or config.data.sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


def check_length(config: LLMConfig, described: dict[str, Any]) -> None:
    """Raise SettingsError if a model, as in a config.json, is declared for shorter sequences than the data's."""
    from stacey_dist.models.causal_lm import causal_config

    longest = getattr(causal_config(described), "max_position_embeddings", None)
    if isinstance(longest, int) and longest > 0:
        allowed = f"{config.model.config or config.model.pretrained} has max_position_embeddings = {longest}"
        config.require(config.data.sequence_length <= longest, "data.sequence_length", allowed)


def _check_corpus(corpus: CorpusConfig, prefix: str) -> None:
    allowed = f"give either {prefix}files or {prefix}dataset, not both (null is no dataset)"
    check(not (corpus.files and corpus.dataset), f"{prefix}dataset", corpus.dataset, allowed)
    alone = corpus.validation_files and not corpus.files
    check(not alone, f"{prefix}validation_files", corpus.validation_files, f"it goes with {prefix}files")


def _check_sources(data: DataConfig) -> None:
    if not data.sources:
        return
    from stacey_dist.data.mixture import LARGEST_PERIOD, shares_of

    for setting in fields(CorpusConfig):
        value, default = getattr(data, setting.name), getattr(CorpusConfig(), setting.name)
        check(value == default, f"data.{setting.name}", value, "with data.sources, each source has its own")
    labels = [source.label for source in data.sources]
    shares = shares_of([source.weight for source in data.sources])
    for i, (source, label, share) in enumerate(zip(data.sources, labels, shares, strict=True)):
        name = f"data.sources[{i}]"
        check(bool(source.files or source.dataset), f"{name}.files", source.files, f"give it, or {name}.dataset")
        plain = re.fullmatch(r"[A-Za-z0-9_-]+", label) is not None
        check(plain, f"{name}.name", repr(label), "it must be of letters, digits, _ and -")
        allowed = f"data.sources[{labels.index(label)}] has that name, too; give each source another"
        check(label not in labels[:i], f"{name}.name", label, allowed)
        check(share > 0, f"{name}.weight", source.weight, f"it must be at least 1/{LARGEST_PERIOD} of all weights")


def _check_model(config: LLMConfig) -> None:
    model = config.model
    if model.source is None:
        _check_numbers(config)
    else:
        both = model.config and model.pretrained
        config.require(not both, "model.config", "give it or model.pretrained, not both")
        allowed = f"model.{model.source} = {getattr(model, model.source)} has its own numbers; change them there"
        for setting in fields(model):
            is_number = setting.name not in ("config", "pretrained", "embeddings", "attention", "dtype")
            is_default = getattr(model, setting.name) == setting.default
            config.require(is_default or not is_number, f"model.{setting.name}", allowed)
    named = [name for name in ("name", "file") if getattr(config.tokenizer, name)]
    alone = model.embeddings is not None and model.pretrained is None
    config.require(not alone, "model.embeddings", "it goes with model.pretrained")
    allowed = "it goes with tokenizer.name or tokenizer.file; the model's own tokenizer has its rows anyway"
    config.require(model.embeddings != "keep" or bool(named), "model.embeddings", allowed)
    allowed = (
        "say what becomes of the embeddings of model.pretrained: --model.embeddings keep, if the ids of this tokenizer "
        "mean the same tokens as the model's own, or new"
    )
    for name in named:
        config.require(model.pretrained is None or model.embeddings is not None, f"tokenizer.{name}", allowed)
    name = config.optimizer.name
    allowed = (
        f"optimizer.name = {name} rounds bfloat16 weights to nearest, which loses its updates; use float32 with "
        "train.mixed_precision bf16, or stacey"
    )
    config.require(model.dtype == "float32" or name in ("stacey", "lp_descent"), "model.dtype", allowed)
    allowed = f"it needs model.dtype float32, not {model.dtype}"
    half = config.train.mixed_precision == "fp16"
    config.require(not half or model.dtype == "float32", "train.mixed_precision", allowed)


def _check_numbers(config: LLMConfig) -> None:
    """Raise SettingsError for numbers that make no LLaMA."""
    model = config.model
    heads, hidden, groups = model.num_attention_heads, model.hidden_size, model.num_key_value_heads
    allowed = f"it must divide model.hidden_size = {hidden}"
    config.require(hidden % heads == 0, "model.num_attention_heads", allowed)
    allowed = f"model.hidden_size / model.num_attention_heads = {hidden // heads} must be even, for rotary embeddings"
    config.require(hidden // heads % 2 == 0, "model.num_attention_heads", allowed)
    allowed = f"it must divide model.num_attention_heads = {heads}"
    config.require(groups is None or heads % groups == 0, "model.num_key_value_heads", allowed)
    longest, length = model.max_position_embeddings, config.data.sequence_length
    allowed = f"it must be at least data.sequence_length = {length}"
    config.require(longest is None or longest >= length, "model.max_position_embeddings", allowed)
