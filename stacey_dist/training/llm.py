"""Language-model pretraining as a task of the training loop: data, model, loss, evaluation, export."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stacey_dist.data.cache import prepare, skipped_records
from stacey_dist.data.lock import locked_directory
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.data.source import Source, embedded_source, files_source, hub_source
from stacey_dist.data.tokenizer import Tokenizer, load_pretrained, load_sentencepiece, train_sentencepiece
from stacey_dist.data.tokens import IGNORED_LABEL, TokenStream
from stacey_dist.data.verify import Verification
from stacey_dist.errors import SettingsError, settings_errors
from stacey_dist.training.ahead import Ahead, Transfer
from stacey_dist.training.attention import Attention, check_attention, generating, implementation
from stacey_dist.training.engine import Engine
from stacey_dist.training.flops import flops_per_token
from stacey_dist.training.initial_weights import make_model
from stacey_dist.training.launchers import Parts
from stacey_dist.training.llm_config import DataConfig, LLMConfig
from stacey_dist.training.run import Run
from stacey_dist.training.saving import export

# The settings that give the arguments of data functions.
_SETTINGS = {
    "files": "data.files",
    "validation_files": "data.validation_files",
    "dataset": "data.dataset",
    "validation_split": "data.dataset_validation_split",
    "on_bad_record": "data.on_bad_record",
    "max_tokens": "data.max_tokens",
    "validation_every": "data.validation_every",
    "cache_dir": "data.cache_dir",
    "vocab_size": "tokenizer.vocab_size",
    "path": "tokenizer.file",
    "name_or_directory": "tokenizer.name",
}

_COMPARED_WINDOWS = 1024
"""An exported tokenizer is compared on the text of so many windows."""


@dataclass(frozen=True)
class TextData:
    """A run's tokenized data, the same on every process, and on the main process its tokenizer."""

    train: TokenStream
    validation: TokenStream
    identity: str
    """Differs where the tokens or the tokenizer differ, wherever their files lie."""
    tokenizer: Tokenizer | None
    verification: Verification | None = None
    """On one process of each host: it compares the tokens with what was written, beside training."""

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return self.train.vocab_size

    @property
    def end_token_id(self) -> int:
        """The id that ends a document."""
        return self.train.end_token_id


def prepare_data(run: Run[LLMConfig]) -> TextData:
    """Tokenize the configured text, or find it in the cache, and open it.

    Raises SettingsError for bad files, an unknown data set or tokenizer, too little text; for a `model.attention` that
    cannot be had.
    """
    check_attention(run)
    tokenizers: list[Tokenizer] = []

    def work() -> tuple[TokenStream, TokenStream, str]:
        directory, tokenizer = tokenize(run.config)
        tokenizers.append(tokenizer)
        train, validation = (
            TokenStream(directory, split, run.config.data.sequence_length) for split in ("train", "validation")
        )
        if train.vocab_size != tokenizer.vocab_size:
            raise SettingsError(
                f"{directory} has tokens of a vocabulary of {train.vocab_size}, and the tokenizer one of "
                f"{tokenizer.vocab_size}; delete the directory"
            )
        return train, validation, hashlib.sha256((train.identity + validation.identity).encode()).hexdigest()

    # The other processes get what they need, and open no file before they read from it.
    train, validation, identity = run.call_on_main(work)
    verification = Verification(train.directory) if run.accelerator.is_local_main_process else None
    run.say(
        f"data: {train.total_labels:,} training and {validation.total_labels:,} held-out tokens, "
        f"vocabulary {train.vocab_size:,}"
    )
    tokenizer = tokenizers[0] if tokenizers else None
    run.save_processor = None if tokenizer is None else tokenizer.save
    return TextData(train, validation, identity, tokenizer, verification)


def tokenize(
    config: LLMConfig, *, verify: bool = False, workers: int = 1, shard: tuple[int, int] = (0, 1)
) -> tuple[Path, Tokenizer]:
    """Return the directory of the configured text's tokens, prepared if it is not there yet, and their tokenizer.

    With `verify`, all tokens that are there are read, and damaged parts prepared again. `workers` and `shard` are those
    of `stacey_dist.data.prepare`. Raises SettingsError as `prepare_data` does.
    """
    data = config.data
    cache = Path(data.cache_dir or Path(config.run_dir) / "data")
    with settings_errors(_SETTINGS):
        source = _source(data)
        tokenizer = _tokenizer(config, source, cache)
        directory = prepare(
            source,
            tokenizer,
            cache,
            max_tokens=data.max_tokens,
            validation_every=data.validation_every,
            verify=verify,
            workers=workers,
            shard=shard,
        )
    if skipped := skipped_records(directory):
        print(f"data.on_bad_record skip: {skipped}", file=sys.stderr, flush=True)
    return directory, tokenizer


def _source(data: DataConfig) -> Source:
    if data.files:
        return files_source(data.files, data.validation_files, data.text_column, data.on_bad_record)
    if data.dataset:
        return hub_source(
            data.dataset,
            data.dataset_config,
            data.dataset_split,
            data.dataset_validation_split,
            data.text_column,
            data.streaming,
            data.on_bad_record,
        )
    return embedded_source()


def _tokenizer(config: LLMConfig, source: Source, cache: Path) -> Tokenizer:
    if config.tokenizer.name:
        return load_pretrained(config.tokenizer.name)
    if config.tokenizer.file:
        return load_sentencepiece(config.tokenizer.file)
    # Trained once for this data and size, then found again.
    identity = json.dumps([source.identity, config.tokenizer.vocab_size], sort_keys=True)
    directory = cache / f"tokenizer-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    with locked_directory(directory, "cache_dir", "make room", announce=True):
        if (directory / "tokenizer.model").exists():
            return load_sentencepiece(directory / "tokenizer.model")
        print(f"training a tokenizer with a vocabulary of {config.tokenizer.vocab_size:,}", flush=True)
        texts = (document.text for document in source.documents())
        return train_sentencepiece(texts, config.tokenizer.vocab_size, directory)


def build_model(run: Run[LLMConfig], data: TextData) -> LlamaForCausalLM:
    """Build the LLaMA of the configuration, see `make_model`."""
    model = run.config.model
    config = LlamaConfig(
        vocab_size=data.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads or model.num_attention_heads,
        max_position_embeddings=model.max_position_embeddings or run.config.data.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tie_word_embeddings,
        bos_token_id=data.end_token_id,
        eos_token_id=data.end_token_id,
        use_cache=False,
    )
    config._attn_implementation = implementation(run.config, LlamaForCausalLM, config)
    llama = make_model(run, lambda: LlamaForCausalLM(config)).to(getattr(torch, model.dtype))
    llama.tie_weights()  # a model that is built without memory is not tied yet
    if run.config.train.gradient_checkpointing:
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    if run.config.train.compile:
        llama.compile()
    count = sum(p.numel() for p in llama.parameters())
    run.say(f"model: LLaMA with {count:,} parameters; {run.config.optimizer.name}, lr {run.config.optimizer.lr:g}")
    return llama


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens, int64 of shape (sequences, sequence_length), and what divides their summed loss."""

    inputs: Tensor
    labels: Tensor
    update_labels: int
    attention: dict[str, Any]
    """What else the forward pass gets: see `Attention.arguments`."""


class LanguageModeling:
    """Next-token prediction over packed windows: the `Task` of `train_llm.py`."""

    unit = "tokens"

    def __init__(self, run: Run[LLMConfig], data: TextData, model: LlamaForCausalLM) -> None:
        self.run, self.data = run, data
        self.batch_size = run.config.train.global_batch_size
        self.samples_per_epoch = len(data.train)
        self.sampler = GlobalSampler(len(data.train), run.config.seed)
        self.data_identity = data.identity
        self._attention = Attention(run.config, model, data.end_token_id)
        self._transfer = Transfer(run.accelerator.device)
        self._ahead = Ahead(self._share, self.batch_size)
        shape = run.config.model
        weights = sum(p.numel() for p in model.parameters())
        if not shape.tie_word_embeddings:
            weights -= model.get_input_embeddings().weight.numel()
        context = run.config.data.sequence_length
        self.flops_per_unit = flops_per_token(weights, shape.num_hidden_layers, shape.hidden_size, context)

    def units(self, position: int) -> int:
        """Return the tokens predicted in the update: fewer than batch x length if the last, partial window is in it."""
        stream, windows = self.data.train, len(self.data.train)
        length = self.run.config.data.sequence_length
        epochs = range(position // windows, (position + self.batch_size - 1) // windows + 1)
        places = [self.sampler.position(windows - 1, epoch) - position for epoch in epochs]
        partial = sum(0 <= place < self.batch_size for place in places)
        return self.batch_size * length - partial * (length - stream.label_count(windows - 1))

    def micro_batches(self, position: int) -> Iterator[TokenBatch]:
        """Yield this process's share of the update's windows, in order. Raises SettingsError for damaged tokens."""
        if self.data.verification is not None:
            self.data.verification.check()
        units = self.units(position)
        for batch in self._ahead.take(position):
            yield self._on_device(batch, units)

    def _share(self, position: int) -> list[tuple[Tensor, ...]]:
        """Return the micro-batches of this process in the update at `position`, in host memory."""
        share, size = self.run.process_batch_size, self.run.micro_batch_size
        first = position + self.run.accelerator.process_index * share
        mine = self.sampler.samples(first, share).tolist()
        return [self._read(self.data.train, mine[start : start + size]) for start in range(0, share, size)]

    def loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return the micro-batch's summed cross-entropy over the number of tokens in the whole update."""
        return self._summed_loss(model, batch) / batch.update_labels

    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return the loss in nats per token and the perplexity over every held-out token, each predicted once."""
        accelerator, stream, size = self.run.accelerator, self.data.validation, self.run.micro_batch_size
        mine = range(accelerator.process_index, len(stream), accelerator.num_processes)
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        # As many forward passes on every process: sharded engines gather weights in each of them.
        longest = math.ceil(len(stream) / accelerator.num_processes)
        for start in range(0, longest, size):
            batch = self._on_device(self._read(stream, mine[start : start + size] or [None]), 1)
            total += self._summed_loss(model, batch)
            if stopping():
                return None
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(total)
        loss = float(total) / stream.total_labels
        return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}

    def score(self, figures: dict[str, float]) -> float:
        """Return the negative loss."""
        return -figures["eval_loss"]

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.close()

    def _summed_loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        logits = model(input_ids=batch.inputs, **batch.attention).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )

    def _read(self, stream: TokenStream, windows: Sequence[int | None]) -> tuple[Tensor, ...]:
        """Return the inputs and labels of windows, and the numbers of their attention; all in host memory.

        None stands for a window without labels.
        """
        length = self.run.config.data.sequence_length
        empty = (np.zeros(length, np.int64), np.full(length, IGNORED_LABEL, np.int64))
        pairs = [empty if i is None else stream.window(i) for i in windows]
        inputs, labels = (np.stack(column) for column in zip(*pairs, strict=True))
        arrays = (inputs, labels, *self._attention.numbers(inputs))
        return tuple(self._transfer.pinned(torch.from_numpy(array)) for array in arrays)

    def _on_device(self, batch: tuple[Tensor, ...], update_labels: int) -> TokenBatch:
        inputs, labels, *numbers = self._transfer(*batch)
        return TokenBatch(inputs, labels, update_labels, self._attention.arguments(tuple(numbers)))


def finish(run: Run[LLMConfig], data: TextData, engine: Engine, checkpoint: Path) -> str:
    """Export the model and its tokenizer, and print what it writes; returns the line that says where they are.

    Raises SettingsError if it was trained on damaged tokens.
    """

    def check_tokens() -> None:
        if data.verification is not None:
            data.verification.check(finish=True)

    def save_tokenizer(directory: Path) -> None:
        assert data.tokenizer is not None  # the main process has it
        data.tokenizer.save(directory, _some_texts(data.train, data.tokenizer))

    run.call_on_main(check_tokens)
    exported = export(run, checkpoint, save_tokenizer)
    run.say(f"\nsample: {sample(run, engine, data)}\n")
    return f"model and tokenizer for transformers: {exported}"


def _some_texts(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    """Return the text of windows from all over the tokens, on which an exported tokenizer is compared."""
    windows = np.unique(np.linspace(0, len(stream) - 1, _COMPARED_WINDOWS, dtype=np.int64))
    return [tokenizer.decode(stream.window(int(i))[0].tolist()) for i in windows]


def sample(run: Run[LLMConfig], engine: Engine, data: TextData) -> str:
    """Return how the trained model continues a held-out text; empty except on the main process.

    All processes call it together: sharded weights are gathered by all.
    """
    length = run.config.data.sequence_length
    prompt_length, new_tokens = max(1, length // 4), max(1, length // 2)
    inputs, _ = data.validation.window(0)
    prompt = torch.from_numpy(inputs[:prompt_length])[None].to(run.accelerator.device)
    torch.manual_seed(run.config.seed)
    model: Any = engine.module
    model.eval()
    with torch.no_grad(), generating(model):
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            pad_token_id=data.end_token_id,
            use_cache=True,
            synced_gpus=run.accelerator.num_processes > 1,
        )[0].tolist()
    if data.tokenizer is None:
        return ""
    beginning, continuation = output[:prompt_length], output[prompt_length:]
    return f"{data.tokenizer.decode(beginning)} ⟶ {data.tokenizer.decode(continuation)}"


PARTS = Parts(prepare_data, build_model, LanguageModeling, finish)
