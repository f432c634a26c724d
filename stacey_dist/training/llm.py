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
from transformers import PreTrainedModel

from stacey_dist.data.cache import prepare, skipped_records
from stacey_dist.data.lock import locked_directory
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.data.source import Source, embedded_source, files_source, hub_source
from stacey_dist.data.tokenizer import Tokenizer, load_pretrained, load_sentencepiece, train_sentencepiece
from stacey_dist.data.tokens import IGNORED_LABEL, TokenStream
from stacey_dist.data.verify import Verification
from stacey_dist.errors import SettingsError, settings_errors
from stacey_dist.models.causal_lm import attended, multiplied_parameters
from stacey_dist.training.ahead import Ahead, Transfer
from stacey_dist.training.callbacks import Callback
from stacey_dist.training.engine import Engine
from stacey_dist.training.flops import flops_per_token
from stacey_dist.training.launchers import Parts
from stacey_dist.training.llm_config import DataConfig, LLMConfig
from stacey_dist.training.llm_model import build_model, check_model, check_vocabulary, own_tokenizer
from stacey_dist.training.run import Run
from stacey_dist.training.samples import Samples, sample
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

    Raises SettingsError for bad files, an unknown data set or tokenizer, too little text.
    """
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
    check_model(config)
    with settings_errors(_SETTINGS):
        source = _source(data)
        tokenizer = own_tokenizer(config) or _tokenizer(config, source, cache)
        check_vocabulary(config, tokenizer)
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


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens, int64 of shape (sequences, sequence_length), and what divides their summed loss."""

    inputs: Tensor
    labels: Tensor
    update_labels: int


class LanguageModeling:
    """Next-token prediction over packed windows: the `Task` of `train_llm.py`."""

    unit = "tokens"

    def __init__(self, run: Run[LLMConfig], data: TextData, model: PreTrainedModel) -> None:
        self.run, self.data = run, data
        self.batch_size = run.config.train.global_batch_size
        self.samples_per_epoch = len(data.train)
        self.sampler = GlobalSampler(len(data.train), run.config.seed)
        self.data_identity = data.identity
        self._transfer = Transfer(run.accelerator.device)
        self._ahead = Ahead(self._share, self.batch_size)
        context = run.config.data.sequence_length
        self._router_weight = getattr(model.config, "router_aux_loss_coef", 0.0)
        self.flops_per_unit = flops_per_token(multiplied_parameters(model), attended(model.config, context))

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
        rank = self.run.accelerator.process_index
        for number, batch in enumerate(self._ahead.take(position)):
            inputs, labels = self._transfer(*batch)
            # Dropout is a function of the seed and the position, too, so that a resumed run has the same.
            key = f"{self.run.config.seed} {position} {rank} {number}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
            yield TokenBatch(inputs, labels, units)

    def _share(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """Return the micro-batches of this process in the update at `position`, in host memory."""
        share, size = self.run.process_batch_size, self.run.micro_batch_size
        first = position + self.run.accelerator.process_index * share
        mine = self.sampler.samples(first, share).tolist()
        return [self._read(self.data.train, mine[start : start + size]) for start in range(0, share, size)]

    def loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return the micro-batch's summed cross-entropy over the number of tokens in the whole update.

        Where the model's configuration asks for its router's loss (`output_router_logits`), that of the micro-batch is
        added, weighted by its share of the update's windows.
        """
        loss, output = self._summed_loss(model, batch)
        loss = loss / batch.update_labels
        if (auxiliary := getattr(output, "aux_loss", None)) is not None:
            loss = loss + self._router_weight * (len(batch.inputs) / self.batch_size) * auxiliary
        return loss

    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return the loss in nats per token and the perplexity over every held-out token, each predicted once."""
        accelerator, stream, size = self.run.accelerator, self.data.validation, self.run.micro_batch_size
        mine = range(accelerator.process_index, len(stream), accelerator.num_processes)
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        # As many forward passes on every process: sharded engines gather weights in each of them.
        longest = math.ceil(len(stream) / accelerator.num_processes)
        for start in range(0, longest, size):
            inputs, labels = self._transfer(*self._read(stream, mine[start : start + size] or [None]))
            total += self._summed_loss(model, TokenBatch(inputs, labels, 1))[0]
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

    def _summed_loss(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Any]:
        """Return the summed cross-entropy, and all that the model returned."""
        output = model(input_ids=batch.inputs)
        logits = output.logits.flatten(0, 1).float()
        return F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"), output

    def _read(self, stream: TokenStream, windows: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """Return the inputs and labels of windows; None stands for a window without labels."""
        length = self.run.config.data.sequence_length
        empty = (np.zeros(length, np.int64), np.full(length, IGNORED_LABEL, np.int64))
        pairs = [empty if i is None else stream.window(i) for i in windows]
        inputs, labels = (self._transfer.pinned(torch.from_numpy(np.stack(c))) for c in zip(*pairs, strict=True))
        return inputs, labels


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
    run.say(f"\nsample: {sample(run, engine, data, max(1, run.config.data.sequence_length // 2))}\n")
    return f"model and tokenizer for transformers: {exported}"


def _some_texts(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    """Return the text of windows from all over the tokens, on which an exported tokenizer is compared."""
    windows = np.unique(np.linspace(0, len(stream) - 1, _COMPARED_WINDOWS, dtype=np.int64))
    return [tokenizer.decode(stream.window(int(i))[0].tolist()) for i in windows]


def _samples(run: Run[LLMConfig], data: TextData) -> list[Callback]:
    return [Samples(data, run.config.tracking.sample_tokens)] if run.config.tracking.sample_tokens else []


PARTS = Parts(prepare_data, build_model, LanguageModeling, finish, _samples)
