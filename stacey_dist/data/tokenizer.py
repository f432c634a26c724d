"""Tokenizers: trained here, any sentencepiece model, or any fast tokenizer of the Hugging Face Hub."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from stacey_dist.data.bpe import train_bpe
from stacey_dist.data.conversion import Inconvertible, convert, first_difference
from stacey_dist.data.embedded import help_topics
from stacey_dist.data.parts import replace_file
from stacey_dist.errors import SettingsError

TRAINING_TEXT = 20_000_000
"""Characters of text that a tokenizer is trained on, at most."""

_CHECKED_TEXT = 2_000_000


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: every id is below it.
        end_token_id: the id that ends a document.
        fingerprint: SHA-256, in hex, of all that ids depend on.
    """

    vocab_size: int
    end_token_id: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens, using several threads."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, leaving special tokens out."""
        ...

    def save(self, directory: Path) -> None:
        """Write what ``AutoTokenizer.from_pretrained(directory)`` loads and encodes to the same ids with."""
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
    return _from_model(model, str(path), texts[::step])


def load_sentencepiece(path: str | Path) -> Tokenizer:
    """Load any sentencepiece ``.model``.

    It is translated for the ``tokenizers`` library, which is what ``transformers`` loads, and the translation
    is checked. Where it is not exact a warning says so, and sentencepiece itself encodes.

    Raises:
        SettingsError: the file cannot be read, is no sentencepiece model, or has no end-of-sentence token.
    """
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"tokenizer.file: {path} cannot be read: {error.strerror}") from error
    return _from_model(model, str(path), _help_texts())


def load_pretrained(name_or_directory: str) -> Tokenizer:
    """Load a fast tokenizer from the Hugging Face Hub, by name, or from a directory. Code from there is never
    run.

    Raises:
        SettingsError: it cannot be loaded, is not a fast tokenizer, has no end-of-sequence token, or would be
            guessed from a sentencepiece model, which ``transformers`` gets wrong.
    """
    import transformers

    setting = f"tokenizer.name: {name_or_directory}"
    try:
        pretrained = transformers.AutoTokenizer.from_pretrained(name_or_directory, trust_remote_code=False)
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
    fingerprint = hashlib.sha256(f"{backend.to_str()} {pretrained.eos_token_id}".encode()).hexdigest()
    tokenizer = _NativeTokenizer(pretrained, fingerprint)
    if len(tokenizer.encode_batch(["The quick brown fox jumps over the lazy dog."])[0]) < 2:
        raise SettingsError(f"{setting} is empty: it gives no tokens for English text")
    return tokenizer


class _NativeTokenizer:
    """A fast tokenizer of ``transformers``; its ids come from the ``tokenizers`` library below it."""

    def __init__(self, pretrained: Any, fingerprint: str, model: bytes | None = None) -> None:
        self._pretrained = pretrained
        self._backend = pretrained.backend_tokenizer
        self._model = model
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_token_id: int = pretrained.eos_token_id
        self.fingerprint = fingerprint

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def save(self, directory: Path) -> None:
        self._pretrained.save_pretrained(directory)
        if self._model is not None:
            (Path(directory) / "tokenizer.model").write_bytes(self._model)


class _SentencePieceTokenizer:
    """A sentencepiece model that ``tokenizers`` cannot reproduce."""

    def __init__(self, processor: Any, fingerprint: str, model: bytes) -> None:
        self._processor = processor
        self._model = model
        self.vocab_size = len(processor)
        self.end_token_id: int = processor.eos_id()
        self.fingerprint = fingerprint

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=-1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    def save(self, directory: Path) -> None:
        """Write the model itself: this one ``AutoTokenizer`` cannot load with the same ids."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "sentencepiece.model").write_bytes(self._model)
        (Path(directory) / "README.txt").write_text(
            "transformers.AutoTokenizer cannot reproduce this tokenizer. Load it with\n"
            'sentencepiece.SentencePieceProcessor(model_file="sentencepiece.model").\n'
        )


def _from_model(model: bytes, name: str, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of a sentencepiece model: a native one where that gives the same ids."""
    import sentencepiece
    import transformers

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, OSError) as error:
        raise SettingsError(f"tokenizer.file: {name} is not a sentencepiece model: {_first_line(error)}") from error
    if processor.eos_id() < 0:
        raise SettingsError(f"tokenizer.file: {name} has no end-of-sentence token, which ends each document")
    try:
        native = convert(model)
        difference = first_difference(native, processor, texts)
        reason = None if difference is None else f"ids differ on {difference[:40]!r}"
    except Inconvertible as error:
        reason = str(error)
    fingerprint = hashlib.sha256((b"native " if reason is None else b"sentencepiece ") + model).hexdigest()
    if reason is not None:
        warnings.warn(
            f"tokenizer {name}: transformers cannot reproduce this sentencepiece model ({reason}). "
            "Sentencepiece itself encodes, and exports hold sentencepiece.model instead of a tokenizer for "
            "AutoTokenizer.",
            stacklevel=3,
        )
        return _SentencePieceTokenizer(processor, fingerprint, model)
    names = {
        "eos_token": processor.eos_id(),
        "bos_token": processor.bos_id(),
        "unk_token": processor.unk_id(),
    }
    pretrained = transformers.PreTrainedTokenizerFast(
        tokenizer_object=native,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **{token: processor.id_to_piece(i) for token, i in names.items() if i >= 0},
    )
    return _NativeTokenizer(pretrained, fingerprint, model)


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
