"""Tokenizers: trained here, any sentencepiece model, or any fast tokenizer of the Hugging Face Hub."""

import hashlib
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from stacey_dist.data.bpe import train_bpe
from stacey_dist.data.conversion import TRICKY_TEXTS, Inconvertible, convert, first_difference
from stacey_dist.data.embedded import help_topics
from stacey_dist.data.special import read_literally, special_tokens, spelled
from stacey_dist.errors import SettingsError
from stacey_dist.files import replace_file

TRAINING_TEXT = 20_000_000
"""Characters of text that a tokenizer is trained on, at most."""

_CHECKED_TEXT = 2_000_000

# Of the texts that a sentencepiece model encodes, the translation is compared on the first and on a share of the rest.
_SAMPLED_FIRST = 256
_SAMPLED_SHARE = 1 / 64
_SAMPLED_TEXT = 20_000


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: every id is below it.
        end_token_id: the id that ends a document.
        fingerprint: SHA-256, in hex, of all that ids depend on.
        difference: what AutoTokenizer, after `save`, gives other ids for; None while nothing is known.
    """

    vocab_size: int
    end_token_id: int
    fingerprint: str
    difference: str | None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, using several threads. Text never becomes a special token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, leaving special tokens out."""
        ...

    def save(self, directory: Path) -> None:
        """Write what ``AutoTokenizer.from_pretrained(directory)`` loads and encodes to the same ids with, or say there
        that it does not."""
        ...


def train_sentencepiece(documents: Iterable[str], vocab_size: int, directory: Path) -> Tokenizer:
    """Train a BPE tokenizer and write it to ``directory/tokenizer.model``.

    Text is not normalized, and characters that did not become pieces are spelled in bytes: decoding gives
    back every text, except that U+2581, by which sentencepiece marks spaces, becomes a space. As in LLaMA,
    digits stand alone, and id 2 ends a document. The same documents give the same tokenizer.

    Args:
        documents: texts, of which the first 20 million characters are used.
        vocab_size: number of ids.
        directory: made if it is not there.

    Raises:
        SettingsError: vocab_size is too large or too small for the text.
    """
    texts = list(_first(documents, TRAINING_TEXT))
    model = train_bpe(texts, vocab_size)
    path = Path(directory) / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, model)  # it is there only when it is complete
    step = max(1, sum(map(len, texts)) // _CHECKED_TEXT)
    return _SentencePieceTokenizer(model, str(path), texts[::step])


def load_sentencepiece(path: str | Path) -> Tokenizer:
    """Load any sentencepiece ``.model``.

    Sentencepiece itself encodes. For exports it is translated for the ``tokenizers`` library, which is what
    ``transformers`` loads, and the translation is checked, on a sample of the texts that are encoded too. Where it is
    not exact a warning says so, and exports hold the model alone.

    Raises:
        SettingsError: the file cannot be read, is no sentencepiece model, or has no end-of-sentence token.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise SettingsError(f"tokenizer.file: {path} is not a file")
        model = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"tokenizer.file: {path} cannot be read: {error.strerror}") from error
    return _SentencePieceTokenizer(model, str(path), _help_texts())


def load_pretrained(name_or_directory: str) -> Tokenizer:
    """Load a fast tokenizer from the Hugging Face Hub, by name, or from a directory. Code from there is never
    run. Text that spells a special token is text, as with `load_sentencepiece`.

    Raises:
        SettingsError: it cannot be loaded, is not a fast tokenizer, has no end-of-sequence token, takes text for a
            special token whatever is done, or would be guessed from a sentencepiece model, which ``transformers`` gets
            wrong.
    """
    import transformers

    setting = f"tokenizer.name: {name_or_directory}"
    try:
        pretrained = transformers.AutoTokenizer.from_pretrained(
            name_or_directory, trust_remote_code=False, split_special_tokens=True
        )
    except Exception as error:  # the Hub client and every tokenizer class have their own
        raise SettingsError(f"{setting} cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error
    backend = getattr(pretrained, "backend_tokenizer", None)
    if backend is None:
        raise SettingsError(f"{setting} is a {type(pretrained).__name__}, which is not a fast tokenizer")
    source = Path(getattr(pretrained, "vocab_file", None) or "")
    if source.suffix == ".model" and not source.with_name("tokenizer.json").exists():
        raise SettingsError(
            f"{setting} has a sentencepiece model and no tokenizer.json, and transformers' conversion of "
            f"such a model gives other ids than the model does; give the path of the .model itself: {source}"
        )
    if pretrained.eos_token_id is None:
        raise SettingsError(f"{setting} has no end-of-sequence token, which ends each document")
    backend.no_truncation()
    backend.no_padding()
    try:
        tokenizer = _PretrainedTokenizer(read_literally(pretrained), setting)
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}") from error
    if len(tokenizer.encode_batch(["The quick brown fox jumps over the lazy dog."])[0]) < 2:
        raise SettingsError(f"{setting} is empty: it gives no tokens for English text")
    return tokenizer


class _PretrainedTokenizer:
    """A fast tokenizer of ``transformers``; its ids come from the ``tokenizers`` library below it."""

    def __init__(self, pretrained: Any, setting: str) -> None:
        self._pretrained = pretrained
        self._backend = pretrained.backend_tokenizer
        self._setting = setting
        self._special = special_tokens(pretrained)
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_token_id: int = pretrained.eos_token_id
        # Its last word is for 0.1.0, which took text for special tokens and gave other ids.
        content = f"{self._backend.to_str()} {pretrained.eos_token_id} literal"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self.difference: str | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        unwanted = set(self._special.values())
        found = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        for text, ids in zip(texts, found, strict=True):
            if not unwanted.isdisjoint(ids):
                raise SettingsError(f"{self._setting} gives special tokens for text, in {text[:60]!r}")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def save(self, directory: Path) -> None:
        self._pretrained.save_pretrained(directory)
        if difference := _export_difference(self, directory, spelled(self._special)):
            _say_that_it_differs(self._setting, directory, difference)


class _SentencePieceTokenizer:
    """A sentencepiece model, which encodes itself; exports hold its translation where that gives the same ids."""

    def __init__(self, model: bytes, name: str, texts: Iterable[str]) -> None:
        self._model = model
        self._name = name
        self._processor = _processor(model, name)
        self.vocab_size = len(self._processor)
        self.end_token_id: int = self._processor.eos_id()
        self.difference: str | None = None
        self._native: Any = None
        self._seen, self._random = 0, random.Random(0)
        try:
            self._native = convert(model)
            if text := first_difference(self._native, self._processor):
                self._differs(f"ids differ on {text[:40]!r}")
        except Inconvertible as error:
            self._differs(str(error))
        # The prefix is 0.1.0's, so that its caches are found where its ids were these.
        prefix = b"native " if self._native is not None else b"sentencepiece "
        self.fingerprint = hashlib.sha256(prefix + model).hexdigest()
        self._compare(list(texts))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=-1)
        if self._native is not None:
            self._compare([text for text in texts if self._is_sampled()])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    def save(self, directory: Path) -> None:
        """Write the translation and the model; the model alone where the translation gives other ids."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.difference is None:
            self._pretrained().save_pretrained(directory)
            (directory / "tokenizer.model").write_bytes(self._model)
            special = [self._processor.id_to_piece(i) for i in range(self.vocab_size) if self._processor.is_control(i)]
            self.difference = _export_difference(self, directory, spelled(special))
        if self.difference is not None:
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"):
                (directory / name).unlink(missing_ok=True)
            (directory / "sentencepiece.model").write_bytes(self._model)
            (directory / "README.txt").write_text(
                f"transformers.AutoTokenizer cannot reproduce this tokenizer ({self.difference!a}). Load it with\n"
                'sentencepiece.SentencePieceProcessor(model_file="sentencepiece.model").\n'
            )

    def _is_sampled(self) -> bool:
        self._seen += 1
        return self._seen <= _SAMPLED_FIRST or self._random.random() < _SAMPLED_SHARE

    def _compare(self, texts: list[str]) -> None:
        """Compare the translation with the model on texts of the corpus."""
        if self._native is None or not texts:
            return
        texts = [text[:_SAMPLED_TEXT] for text in texts]
        expected = self._processor.encode(texts, num_threads=-1)
        found = self._native.encode_batch_fast(texts, add_special_tokens=False)
        for ids, encoding in zip(expected, found, strict=True):
            if ids != encoding.ids:
                at = next((i for i, (a, b) in enumerate(zip(ids, encoding.ids, strict=False)) if a != b), 0)
                near = self._processor.decode(ids[max(0, at - 2) : at + 8])
                return self._differs(f"ids differ on {near[:40]!r}")

    def _differs(self, difference: str) -> None:
        self.difference, self._native = difference, None
        warnings.warn(
            f"tokenizer {self._name}: transformers cannot reproduce this sentencepiece model ({difference}). "
            "Sentencepiece itself encodes, and exports hold sentencepiece.model instead of a tokenizer for "
            "AutoTokenizer.",
            stacklevel=4,
        )

    def _pretrained(self) -> Any:
        import transformers

        names = {
            "eos_token": self._processor.eos_id(),
            "bos_token": self._processor.bos_id(),
            "unk_token": self._processor.unk_id(),
        }
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=self._native,
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,
            **{token: self._processor.id_to_piece(i) for token, i in names.items() if i >= 0},
        )


def _processor(model: bytes, name: str) -> Any:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, OSError) as error:
        raise SettingsError(f"tokenizer.file: {name} is not a sentencepiece model: {_first_line(error)}") from error
    if processor.eos_id() < 0:
        raise SettingsError(f"tokenizer.file: {name} has no end-of-sentence token, which ends each document")
    return processor


def _export_difference(tokenizer: Tokenizer, directory: Path, texts: list[str]) -> str | None:
    """Return a text that the tokenizer which AutoTokenizer loads from a directory encodes differently, or None."""
    import transformers

    samples = [*TRICKY_TEXTS, *texts]
    loaded = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    found = loaded(samples, add_special_tokens=False)["input_ids"]
    pairs = zip(samples, tokenizer.encode_batch(samples), found, strict=True)
    return next((text[:40] for text, ids, others in pairs if ids != others), None)


def _say_that_it_differs(setting: str, directory: Path, difference: str) -> None:
    message = f"AutoTokenizer gives other ids for {difference!a} than training saw"
    warnings.warn(f"{setting}: {directory}: {message}", stacklevel=3)
    (Path(directory) / "README.txt").write_text(f"The tokenizer here is not quite that of training: {message}.\n")


def _help_texts() -> list[str]:
    """Return ordinary text to check translations on, where this Python has it."""
    try:
        return [document.text for document in help_topics()]
    except SettingsError:
        return []


def _first(documents: Iterable[str], characters: int) -> Iterator[str]:
    for text in documents:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
