"""The text of a run of `train_llm.py`: its sources, their tokens and the tokenizer."""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path

from stacey_dist.data.cache import prepare, skipped_records
from stacey_dist.data.lock import locked_directory
from stacey_dist.data.mixture import shares_of
from stacey_dist.data.parts import SPLITS
from stacey_dist.data.source import Input, Source, embedded_source, files_source, hub_source
from stacey_dist.data.splits import overlap
from stacey_dist.data.tokenizer import (
    TRAINING_TEXT,
    Tokenizer,
    first_characters,
    load_pretrained,
    load_sentencepiece,
    train_sentencepiece,
)
from stacey_dist.data.tokens import TokenStream
from stacey_dist.data.verify import Verification
from stacey_dist.errors import SettingsError, settings_errors
from stacey_dist.training.run import Run
from stacey_dist.training.settings.config import data_directory
from stacey_dist.training.settings.llm_config import CorpusConfig, LLMConfig
from stacey_dist.training.tasks.attention import check_attention
from stacey_dist.training.tasks.llm_model import check_model, check_vocabulary, own_tokenizer

# Which setting gives an argument of the data functions, beside those of a source.
_SETTINGS = {
    "cache_dir": "data.cache_dir",
    "vocab_size": "tokenizer.vocab_size",
    "path": "tokenizer.file",
    "name_or_directory": "tokenizer.name",
}


@dataclass(frozen=True)
class Corpus:
    """The tokens of a source."""

    name: str
    """The source's name in a mixture; empty if there is only one source."""
    share: int
    """The source's number of windows per period of the mixture; the period is the sum of all shares."""
    train: TokenStream
    validation: TokenStream


@dataclass(frozen=True)
class TextData:
    """A run's tokenized data, the same on every process, and on the main process its tokenizer."""

    corpora: list[Corpus]
    """The sources, at least one."""
    identity: str
    """Differs where the tokens, the tokenizer or the mixture differ, wherever the files lie."""
    tokenizer: Tokenizer | None
    verification: Verification | None = None
    """On one process of each host: it compares the tokens with what was written, in the background."""

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return self.corpora[0].train.vocab_size

    @property
    def end_token_id(self) -> int:
        """The id that ends a document."""
        return self.corpora[0].train.end_token_id


def prepare_data(run: Run[LLMConfig]) -> TextData:
    """Tokenize the configured text, or find it in the cache, and open it.

    Raises SettingsError for bad files, an unknown data set or tokenizer, too little text; for a `model.attention` that
    is not available.
    """
    check_attention(run)
    data = run.config.data
    tokenizers: list[Tokenizer] = []

    def work() -> tuple[list[Corpus], str]:
        directories, tokenizer = tokenize(run.config)
        tokenizers.append(tokenizer)
        names, shares = [source.label for source in data.sources], shares_of([each.weight for each in data.sources])
        corpora = [
            Corpus(name, share, *(TokenStream(directory, split, data.sequence_length) for split in SPLITS))
            for name, share, directory in zip(names or [""], shares or [1], directories, strict=True)
        ]
        for directory, corpus in zip(directories, corpora, strict=True):
            if corpus.train.vocab_size != tokenizer.vocab_size:
                raise SettingsError(
                    f"{directory} has tokens of a vocabulary of {corpus.train.vocab_size}, and the tokenizer one of "
                    f"{tokenizer.vocab_size}; delete the directory"
                )
        return corpora, _identity(corpora)

    # The other processes get what they need, and open no file before they read from it.
    corpora, identity = run.call_on_main(work)
    verification = None
    if run.accelerator.is_local_main_process:
        verification = Verification(*(corpus.train.directory for corpus in corpora))
    text = TextData(corpora, identity, tokenizers[0] if tokenizers else None, verification)
    run.save_processor = None if text.tokenizer is None else text.tokenizer.save
    run.say(_described(text))
    return text


def tokenize(
    config: LLMConfig, *, verify: bool = False, workers: int = 1, shard: tuple[int, int] = (0, 1)
) -> tuple[list[Path], Tokenizer]:
    """Return the directory of each source's tokens, prepared if it is not there yet, and their tokenizer.

    With `verify`, all tokens that are there are read, and damaged parts prepared again. `workers` and `shard` are those
    of `stacey_dist.data.prepare`. Raises SettingsError as `prepare_data` does.
    """
    cache = Path(config.data.cache_dir or data_directory(config.run_dir))
    check_model(config)
    corpora = config.data.corpora()
    sources = []
    for prefix, corpus in corpora.items():
        with _settings_errors(prefix):
            sources.append(_source(corpus))
    _check_apart(corpora, sources)
    with settings_errors(_SETTINGS):
        own = own_tokenizer(config)
        tokenizer = own or _tokenizer(config, sources, cache)
        if own is None and config.model.embeddings != "keep":
            tokenizer.begin_with_end()
        check_vocabulary(config, tokenizer)
    directories = []
    for (prefix, corpus), source in zip(corpora.items(), sources, strict=True):
        with _settings_errors(prefix):
            directory = prepare(
                source,
                tokenizer,
                cache,
                max_tokens=corpus.max_tokens,
                validation_every=corpus.validation_every,
                verify=verify,
                workers=workers,
                shard=shard,
            )
        if skipped := skipped_records(directory):
            print(f"{prefix}on_bad_record skip: {skipped}", file=sys.stderr, flush=True)
        directories.append(directory)
    return directories, tokenizer


def _check_apart(corpora: Mapping[str, CorpusConfig], sources: Sequence[Source]) -> None:
    """Raise SettingsError where a source trains on what another one holds out."""
    named = zip(corpora.items(), sources, strict=True)
    for ((one, corpus), holding), ((other, other_corpus), training) in itertools.permutations(named, 2):
        alike = corpus.validation_every == other_corpus.validation_every
        if alike and holding.identity == training.identity:  # they hold the same documents out
            continue
        (read, held), (also_read, _) = _text_settings(corpus), _text_settings(other_corpus)
        if both := _read_by_both(holding.validation_inputs or (), training.inputs):
            raise SettingsError(f"{one}{held}: {both} has text of {other}{also_read}: it would be trained on")
        if holding.validation_inputs is None and (both := _read_by_both(holding.inputs, training.inputs)):
            raise SettingsError(
                f"{one}{read}: {both} has text of {other}{also_read}, which would train on the documents that are "
                f"held out of it; give both sources {held}"
            )


def _text_settings(corpus: CorpusConfig) -> tuple[str, str]:
    """Return the names of the settings that give a source's training and validation text."""
    return ("files", "validation_files") if corpus.files else ("dataset", "dataset_validation_split")


def _read_by_both(some: Iterable[Input], others: Iterable[Input]) -> str | None:
    """Return the name of the first input that certainly has documents of another source's inputs; None if none has."""
    splits: dict[str, list[str]] = {}
    for text, split in map(_text_of, others):
        splits.setdefault(text, []).append(split)
    for text, split in map(_text_of, some):
        if any(overlap(split, other) for other in splits.get(text, ())):
            return f"split {split!r} of {text}" if split else text
    return None


def _text_of(text: Input) -> tuple[str, str]:
    """Return which text an input reads, a file's real path or a dataset's name, and the split of a dataset."""
    if "file" in text.identity:
        return text.identity["file"]["path"], ""
    if "dataset" not in text.identity:
        return "the embedded text", ""
    dataset, config = text.identity["dataset"], text.identity["config"]
    # A directory is known by its files.
    name = dataset if isinstance(dataset, str) else os.path.commonpath([file["path"] for file in dataset])
    return f"{name!r}" + (f", configuration {config!r}" if config else ""), text.identity["split"]


def _settings_errors(prefix: str) -> AbstractContextManager[None]:
    """Name the settings of the source, which begin with a prefix, in errors."""
    of_source = {setting.name: prefix + setting.name for setting in fields(CorpusConfig)}
    of_source["validation_split"] = f"{prefix}dataset_validation_split"
    return settings_errors(_SETTINGS | of_source)


def _source(corpus: CorpusConfig) -> Source:
    if corpus.files:
        return files_source(corpus.files, corpus.validation_files, corpus.text_column, corpus.on_bad_record)
    if corpus.dataset:
        return hub_source(
            corpus.dataset,
            corpus.dataset_config,
            corpus.dataset_split,
            corpus.dataset_validation_split,
            corpus.text_column,
            corpus.streaming,
            corpus.on_bad_record,
        )
    return embedded_source()


def _tokenizer(config: LLMConfig, sources: list[Source], cache: Path) -> Tokenizer:
    if config.tokenizer.name:
        return load_pretrained(config.tokenizer.name)
    if config.tokenizer.file:
        return load_sentencepiece(config.tokenizer.file)
    # Trained once for these data and size, then found again. It does not depend on the weights, so that these can be
    # changed without another vocabulary.
    identities = [source.identity for source in sources]
    identity = json.dumps([*identities, config.tokenizer.vocab_size], sort_keys=True)
    directory = cache / f"tokenizer-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    with locked_directory(directory, "cache_dir", "make room"):
        if (directory / "tokenizer.model").exists():
            return load_sentencepiece(directory / "tokenizer.model")
        print(f"training a tokenizer with a vocabulary of {config.tokenizer.vocab_size:,}", flush=True)
        of_each = -(-TRAINING_TEXT // len(sources))
        texts = itertools.chain.from_iterable(
            first_characters(_texts(prefix, source), of_each)
            for prefix, source in zip(config.data.corpora(), sources, strict=True)
        )
        return train_sentencepiece(texts, config.tokenizer.vocab_size, directory)


def _texts(prefix: str, source: Source) -> Iterator[str]:
    with _settings_errors(prefix):
        for document in source.documents():
            yield document.text


def _identity(corpora: list[Corpus]) -> str:
    text = "".join(corpus.train.identity + corpus.validation.identity for corpus in corpora)
    if len(corpora) > 1:
        text += json.dumps([corpus.share for corpus in corpora])
    return hashlib.sha256(text.encode()).hexdigest()


def _described(data: TextData) -> str:
    train = sum(corpus.train.total_labels for corpus in data.corpora)
    held_out = sum(corpus.validation.total_labels for corpus in data.corpora)
    period = sum(corpus.share for corpus in data.corpora)
    lines = [f"data: {train:,} training and {held_out:,} held-out tokens, vocabulary {data.vocab_size:,}"]
    lines += [
        f"  {corpus.name}: {corpus.share:,} of {period:,} sequences ({corpus.share / period:.2%}), "
        f"{corpus.train.total_labels:,} training and {corpus.validation.total_labels:,} held-out tokens"
        for corpus in data.corpora
        if corpus.name
    ]
    return "\n".join(lines)
