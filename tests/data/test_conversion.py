"""Sentencepiece models of every kind: exported with the same ids, or with a warning not at all."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from stacey_dist.data import Document, Tokenizer, load_sentencepiece
from stacey_dist.data.conversion import TRICKY_TEXTS, convert
from stacey_dist.data.tokenizer import _NativeTokenizer, _SentencePieceTokenizer
from stacey_dist.errors import SettingsError


@pytest.fixture(scope="module")
def texts(library: list[Document]) -> list[str]:
    return [document.text for document in library]


def other_model(texts: list[str], path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts[:80] for line in text.split("\n")),
        model_writer=model,
        **dict(vocab_size=1200, minloglevel=2, max_sentence_length=16384) | options,
    )
    path.write_bytes(model.getvalue())
    return path


LLAMA = dict(
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    split_digits=True,
    allow_whitespace_only_pieces=True,
)
EXACT = {
    "as LLaMA, dummy prefix": LLAMA,
    "BPE with sentencepiece's defaults": dict(model_type="bpe"),
    "BPE, spaces trimmed": dict(model_type="bpe", normalization_rule_name="identity"),
    "pieces across words": LLAMA | dict(split_by_whitespace=False),
    "user-defined symbols": LLAMA | dict(add_dummy_prefix=False, user_defined_symbols=["<sep>", "[x]"]),
}
INEXACT = {
    "spaces after words": (LLAMA | dict(treat_whitespace_as_suffix=True), "the space after a word"),
    "characters": (dict(model_type="char", hard_vocab_limit=False), "neither BPE nor unigram"),
    "symbols after a dummy prefix": (LLAMA | dict(user_defined_symbols=["<sep>"]), "ids differ on"),
}


@pytest.mark.parametrize("name", EXACT)
def test_models_that_convert_exactly(texts: list[str], tmp_path: Path, name: str) -> None:
    path = other_model(texts, tmp_path / "x.model", **EXACT[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tokenizer = load_sentencepiece(path)
    check(tokenizer, path, [*TRICKY_TEXTS, *texts[:80]], tmp_path / "export", True)


@pytest.mark.parametrize("name", INEXACT)
def test_models_that_fall_back(texts: list[str], tmp_path: Path, name: str) -> None:
    options, reason = INEXACT[name]
    path = other_model(texts, tmp_path / "x.model", **options)
    with pytest.warns(UserWarning, match=rf"x\.model: transformers cannot reproduce.*{reason}"):
        tokenizer = load_sentencepiece(path)
    check(tokenizer, path, [*TRICKY_TEXTS, *texts[:80]], tmp_path / "export", False)


@pytest.mark.parametrize(("rule", "byte_fallback"), [("nmt_nfkc", False), ("identity", True)])
def test_unigram_converts_or_falls_back(texts: list[str], tmp_path: Path, rule: str, byte_fallback: bool) -> None:
    """Sentencepiece adds scores in float32, `tokenizers` in float64: which one it is depends on the model."""
    path = other_model(
        texts,
        tmp_path / "x.model",
        model_type="unigram",
        normalization_rule_name=rule,
        byte_fallback=byte_fallback,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer = load_sentencepiece(path)
    native = isinstance(tokenizer, _NativeTokenizer)
    assert native != any("cannot reproduce" in str(warning.message) for warning in caught)
    check(tokenizer, path, TRICKY_TEXTS, tmp_path / "export", native)


def test_unigram_never_reads_symbols_in_text(texts: list[str], tmp_path: Path) -> None:
    path = other_model(
        texts,
        tmp_path / "x.model",
        model_type="unigram",
        normalization_rule_name="identity",
        byte_fallback=True,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    samples = ["<s>", "a</s>b", "<unk>", "<0x0A> <0x41>"]
    converted = convert(path.read_bytes()).encode_batch(samples, add_special_tokens=False)
    assert [encoding.ids for encoding in converted] == processor.encode(samples)


def check(tokenizer: Tokenizer, path: Path, samples: Any, export: Path, native: bool) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = processor.encode(list(samples))
    assert tokenizer.encode_batch(samples) == ids
    assert (tokenizer.vocab_size, tokenizer.end_token_id) == (len(processor), processor.eos_id())
    assert isinstance(tokenizer, _NativeTokenizer if native else _SentencePieceTokenizer)
    assert tokenizer.decode(processor.encode("a b c")) == processor.decode(processor.encode("a b c"))
    tokenizer.save(export)
    if native:
        assert AutoTokenizer.from_pretrained(export)(list(samples))["input_ids"] == ids
    else:
        assert sorted(p.name for p in export.iterdir()) == ["README.txt", "sentencepiece.model"]
        assert "AutoTokenizer cannot" in (export / "README.txt").read_text()
        assert load_again(export / "sentencepiece.model") == tokenizer.fingerprint


def load_again(path: Path) -> str:
    with pytest.warns(UserWarning, match="cannot reproduce"):
        return load_sentencepiece(path).fingerprint


def test_bad_sentencepiece_files(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(SettingsError, match=r"junk\.model is not a sentencepiece model"):
        load_sentencepiece(tmp_path / "junk.model")
    with pytest.raises(SettingsError, match=r"missing\.model cannot be read"):
        load_sentencepiece(tmp_path / "missing.model")
    with pytest.raises(SettingsError, match=r"x\.model has no end-of-sentence token"):
        load_sentencepiece(other_model(texts, tmp_path / "x.model", model_type="bpe", eos_id=-1))
