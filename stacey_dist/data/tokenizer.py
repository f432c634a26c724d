"""Tokenizers: trained here, any sentencepiece model, or any fast tokenizer of the Hugging Face Hub."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from stacey_dist.data.bpe import train_bpe
from stacey_dist.data.conversion import TRICKY_TEXTS, Inconvertible, convert
from stacey_dist.data.special import as_generic, read_literally, special_tokens, spelled
from stacey_dist.errors import InputError, one_line
from stacey_dist.files import open_regular, replace_file

TRAINING_TEXT = 20_000_000
"""Characters of text that a tokenizer is trained on, at most."""


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
        """Return the ids of each text. Text never becomes a special token.

        Several threads are used, one where the environment has ``TOKENIZERS_PARALLELISM=false``.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, leaving special tokens out."""
        ...

    def begin_with_end(self) -> None:
        """Have saved tokenizers begin texts with no token, and name the end token as the begin token.

        For a model that saw no begin token in training, where each document follows an end token.
        """
        ...

    def save(self, directory: Path, texts: Sequence[str] = ()) -> None:
        """Save for ``AutoTokenizer.from_pretrained(directory)``.

        What it loads is compared on ``texts`` and on texts that tokenizers disagree on. Where ids differ, a warning
        and a ``README.txt`` in the directory say so.
        """
        ...


def train_sentencepiece(documents: Iterable[str], vocab_size: int, directory: Path) -> Tokenizer:
    """Train a BPE tokenizer and save it as ``directory/tokenizer.model``.

    Text is not normalized, and characters that did not become pieces are spelled in bytes: decoding gives
    back every text, except that U+2581, by which sentencepiece marks spaces, becomes a space. As in LLaMA,
    each digit is a token, and id 2 ends a document. The same documents give the same tokenizer.

    Args:
        documents: texts, of which the first 20 million characters are used.
        vocab_size: number of ids.
        directory: made if it is not there.

    Raises:
        InputError: vocab_size is too large or too small for the text.
    """
    # Read before training: sentencepiece would make its own errors of those in reading.
    texts = list(first_characters(documents, TRAINING_TEXT))
    model = train_bpe(texts, vocab_size)
    path = Path(directory) / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, model)  # it is there only when it is complete
    return _SentencePieceTokenizer(model, str(path))


def first_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Yield texts up to so many characters in all, the last one cut off there."""
    for text in documents:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def load_sentencepiece(path: str | Path) -> Tokenizer:
    """Load any sentencepiece ``.model``, by which sentencepiece itself encodes.

    For exports it is converted for ``transformers``. Where no conversion gives the same ids, a warning says so, and
    exports hold the model alone.

    Raises:
        InputError: the file cannot be read, is no sentencepiece model, or has no end-of-sentence token.
    """
    try:
        with open_regular(Path(path)) as file:
            model = file.read()
    except OSError as error:
        raise InputError(f"path: {path} cannot be read: {error.strerror}") from error
    return _SentencePieceTokenizer(model, str(path))


def load_pretrained(name_or_directory: str) -> Tokenizer:
    """Load a fast tokenizer from the Hugging Face Hub, by name, or from a directory. Code from there is never
    run. Text that spells a special token is text, as with `load_sentencepiece`.

    Raises:
        InputError: it cannot be loaded, is not a fast tokenizer, has no end-of-sequence token, takes text for a
            special token whatever is done, or would be guessed from a sentencepiece model, which ``transformers`` gets
            wrong.
    """
    import transformers

    name = f"name_or_directory: {name_or_directory}"
    try:
        # The classes of many models make steps of their own in the place of those in tokenizer.json.
        known = _has_tokenizer_json(name_or_directory)
        loader = transformers.PreTrainedTokenizerFast if known else transformers.AutoTokenizer
        pretrained = loader.from_pretrained(name_or_directory, trust_remote_code=False, split_special_tokens=True)
        if known and pretrained.eos_token_id is None:
            special = _special_tokens_of_class(name_or_directory, pretrained)
            pretrained = loader.from_pretrained(
                name_or_directory, trust_remote_code=False, split_special_tokens=True, **special
            )
    except Exception as error:  # the Hub client and every tokenizer class have their own
        raise InputError(f"{name} cannot be loaded: {one_line(error)}") from error
    backend = getattr(pretrained, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{name} is a {type(pretrained).__name__}, which is not a fast tokenizer")
    source = Path(getattr(pretrained, "vocab_file", None) or "")
    if source.suffix == ".model" and not source.with_name("tokenizer.json").exists():
        raise InputError(
            f"{name} has a sentencepiece model and no tokenizer.json, and transformers' conversion of "
            f"such a model gives other ids than the model does; give the path of the .model itself: {source}"
        )
    if pretrained.eos_token_id is None:
        raise InputError(f"{name} has no end-of-sequence token, which ends each document")
    backend.no_truncation()
    backend.no_padding()
    try:
        tokenizer = _PretrainedTokenizer(read_literally(pretrained), name_or_directory)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    if len(tokenizer.encode_batch(["The quick brown fox jumps over the lazy dog."])[0]) < 2:
        raise InputError(f"{name} is empty: it gives no tokens for English text")
    return tokenizer


def _special_tokens_of_class(name_or_directory: str, pretrained: Any) -> dict[str, str]:
    """Return the special tokens that a tokenizer's class has and no file names, as GPT-2's does, where it has them."""
    import transformers

    with contextlib.suppress(Exception):  # every class has its own, and there may be none
        named = transformers.AutoTokenizer.from_pretrained(name_or_directory, trust_remote_code=False)
        vocabulary = pretrained.get_vocab()
        return {name: token for name, token in named.special_tokens_map.items() if token in vocabulary}
    return {}


def _has_tokenizer_json(name_or_directory: str) -> bool:
    from transformers.utils import cached_file

    try:
        return cached_file(name_or_directory, "tokenizer.json") is not None
    except OSError:  # it is not there, or nothing is, which the loader says
        return False


class _PretrainedTokenizer:
    """A fast tokenizer of ``transformers``; its ids come from the ``tokenizers`` library below it."""

    def __init__(self, pretrained: Any, name: str) -> None:
        self._pretrained = pretrained
        self._backend = pretrained.backend_tokenizer
        self._name = name
        self._special = special_tokens(pretrained)
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_token_id: int = pretrained.eos_token_id
        # The last word tells the ids from those of 0.1.0, which took text for special tokens.
        content = f"{self._backend.to_str()} {pretrained.eos_token_id} literal"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        unwanted = {*self._special.values(), self.end_token_id}  # the unknown token may be the end token, too
        found = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        for text, ids in zip(texts, found, strict=True):
            if not unwanted.isdisjoint(ids):
                raise InputError(f"name_or_directory: {self._name} gives special tokens for text, in {text[:60]!r}")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def begin_with_end(self) -> None:
        self._backend.post_processor = None
        self._pretrained = as_generic(self._pretrained, bos_token=self._pretrained.eos_token)

    def save(self, directory: Path, texts: Sequence[str] = ()) -> None:
        self._pretrained.save_pretrained(directory)
        if difference := _export_difference(self, directory, [*spelled(self._special), *texts]):
            message = f"AutoTokenizer gives other ids for {difference!a} than training saw"
            warnings.warn(f"tokenizer {self._name}: {directory}: {message}", stacklevel=2)
            (Path(directory) / "README.txt").write_text(f"This tokenizer is not quite that of training: {message}.\n")


class _SentencePieceTokenizer:
    """A sentencepiece model. Exports hold its conversion where that gives the same ids, and otherwise the model."""

    def __init__(self, model: bytes, name: str) -> None:
        import sentencepiece

        self._model = model
        self._name = name
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"path: {name} is not a sentencepiece model: {one_line(error)}") from error
        if self._processor.eos_id() < 0:
            raise InputError(f"path: {name} has no end-of-sentence token, which ends each document")
        self.vocab_size = len(self._processor)
        self.end_token_id: int = self._processor.eos_id()
        self._begin_id: int = self._processor.bos_id()
        self._converted: Any = None
        try:
            self._converted = convert(model)
        except Inconvertible as error:
            self._inconvertible = str(error)
            self._warn()
        # The prefix is 0.1.0's, so that its caches are found where its ids were these.
        prefix = b"sentencepiece " if self._converted is None else b"native "
        self.fingerprint = hashlib.sha256(prefix + model).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The variable by which the `tokenizers` library is told, too.
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    def begin_with_end(self) -> None:
        self._begin_id = self.end_token_id

    def save(self, directory: Path, texts: Sequence[str] = ()) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._converted is not None:
            self._pretrained().save_pretrained(directory)
            special = [self._processor.id_to_piece(i) for i in range(self.vocab_size) if self._processor.is_control(i)]
            difference = _export_difference(self, directory, [*spelled(special), *texts])
            if difference is None:
                (directory / "tokenizer.model").write_bytes(self._model)
                return
            self._inconvertible = f"ids differ on {difference!r}"
            self._warn()
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (directory / name).unlink(missing_ok=True)
        (directory / "sentencepiece.model").write_bytes(self._model)
        (directory / "README.txt").write_text(
            f"transformers.AutoTokenizer cannot reproduce this tokenizer ({self._inconvertible!a}). Load it with\n"
            'sentencepiece.SentencePieceProcessor(model_file="sentencepiece.model").\n'
        )

    def _warn(self) -> None:
        warnings.warn(
            f"tokenizer {self._name}: transformers cannot reproduce this sentencepiece model ({self._inconvertible}). "
            "Sentencepiece itself encodes, and exports hold sentencepiece.model instead of a tokenizer for "
            "AutoTokenizer.",
            stacklevel=4,
        )

    def _pretrained(self) -> Any:
        import transformers

        names = {
            "eos_token": self._processor.eos_id(),
            "bos_token": self._begin_id,
            "unk_token": self._processor.unk_id(),
        }
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=self._converted,
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,
            **{token: self._processor.id_to_piece(i) for token, i in names.items() if i >= 0},
        )


def _export_difference(tokenizer: Tokenizer, directory: Path, texts: Sequence[str]) -> str | None:
    """Return where AutoTokenizer, loaded from a directory, first gives other ids than a tokenizer, or None."""
    import transformers

    samples = [*TRICKY_TEXTS, *texts]
    loaded = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    found = loaded(samples, add_special_tokens=False)["input_ids"]
    for text, ids, others in zip(samples, tokenizer.encode_batch(samples), found, strict=True):
        if ids != others:
            at = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), 0)
            return tokenizer.decode(ids[max(0, at - 2) : at + 8])[:40] or text[:40]
    return None
