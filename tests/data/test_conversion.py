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
    "BPE, spaces trimmed": dict(model_type="bpe", normalization_rule_name="identity"),
    "pieces across words": LLAMA | dict(split_by_whitespace=False),
    "user-defined symbols": LLAMA | dict(add_dummy_prefix=False, user_defined_symbols=["<sep>", "[x]"]),
}
INEXACT = {
    "BPE with sentencepiece's defaults": (dict(model_type="bpe"), "it normalizes text by a table of characters"),
    "unigram with sentencepiece's defaults": (dict(model_type="unigram"), "it normalizes text by a table"),
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


def test_unigram_converts_or_falls_back(texts: list[str], tmp_path: Path) -> None:
    """Sentencepiece adds scores in float32, `tokenizers` in float64: which one it is depends on the model."""
    options = dict(model_type="unigram", normalization_rule_name="identity", byte_fallback=True)
    path = other_model(texts, tmp_path / "x.model", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer = load_sentencepiece(path)
    native = tokenizer.difference is None
    assert native != any("cannot reproduce" in str(warning.message) for warning in caught)
    check(tokenizer, path, TRICKY_TEXTS, tmp_path / "export", native)


def test_a_difference_that_the_corpus_alone_shows_is_found(texts: list[str], tmp_path: Path) -> None:
    """Here the translation is made wrong for one word; the ids are sentencepiece's, and the export says so."""
    path = other_model(texts, tmp_path / "x.model", **LLAMA)
    tokenizer: Any = load_sentencepiece(path)
    from tokenizers import AddedToken

    tokenizer._native.add_tokens([AddedToken("zebra crossing", normalized=False)])
    corpus = ["plain text"] * 100 + ["over the zebra crossing"]
    with pytest.warns(UserWarning, match="ids differ on '.*z"):
        ids = tokenizer.encode_batch(corpus)
    check(tokenizer, path, corpus, tmp_path / "export", False, loads_with_a_warning=False)
    assert ids == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(corpus)


def test_an_export_that_loads_otherwise_says_so(texts: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    path = other_model(texts, tmp_path / "x.model", **LLAMA)
    tokenizer = load_sentencepiece(path)
    monkeypatch.setattr("stacey_dist.data.tokenizer._export_difference", lambda *_: "some text")
    tokenizer.save(tmp_path / "export")
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == ["README.txt", "sentencepiece.model"]


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


def check(
    tokenizer: Tokenizer, path: Path, samples: Any, export: Path, exact: bool, loads_with_a_warning: bool = True
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = processor.encode(list(samples))
    assert tokenizer.encode_batch(samples) == ids
    assert (tokenizer.vocab_size, tokenizer.end_token_id) == (len(processor), processor.eos_id())
    assert (tokenizer.difference is None) == exact
    assert tokenizer.decode(processor.encode("a b c")) == processor.decode(processor.encode("a b c"))
    tokenizer.save(export)
    if exact:
        assert AutoTokenizer.from_pretrained(export)(list(samples))["input_ids"] == ids
    else:
        assert sorted(p.name for p in export.iterdir()) == ["README.txt", "sentencepiece.model"]
        assert "AutoTokenizer cannot" in (export / "README.txt").read_text()
        if loads_with_a_warning:
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
