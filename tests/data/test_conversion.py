"""Sentencepiece models of every kind: exported with the same ids, or with a warning not for AutoTokenizer."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from stacey_dist.data import Document, Tokenizer, load_sentencepiece
from stacey_dist.data.conversion import TRICKY_TEXTS
from stacey_dist.errors import InputError


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
    "unigram": (dict(model_type="unigram", normalization_rule_name="identity"), "it is not a BPE model"),
    "spaces after words": (LLAMA | dict(treat_whitespace_as_suffix=True), "the space after a word"),
    "characters": (dict(model_type="char", hard_vocab_limit=False), "it is not a BPE model"),
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


def test_a_difference_that_the_corpus_alone_shows_is_found(texts: list[str], tmp_path: Path) -> None:
    """Here the conversion is made wrong for one word; the ids are sentencepiece's, and the export says so."""
    path = other_model(texts, tmp_path / "x.model", **LLAMA)
    tokenizer: Any = load_sentencepiece(path)
    from tokenizers import AddedToken

    tokenizer._converted.add_tokens([AddedToken("zebra crossing", normalized=False)])
    corpus = ["plain text"] * 100 + ["over the zebra crossing"]
    with pytest.warns(UserWarning, match=r"x\.model: transformers cannot reproduce .*ids differ on '.*z"):
        tokenizer.save(tmp_path / "export", corpus)
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == ["README.txt", "sentencepiece.model"]
    assert "ids differ on '" in (tmp_path / "export" / "README.txt").read_text()
    assert tokenizer.encode_batch(corpus) == sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(corpus)


def test_an_export_that_loads_otherwise_says_so(texts: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    path = other_model(texts, tmp_path / "x.model", **LLAMA)
    tokenizer = load_sentencepiece(path)
    monkeypatch.setattr("stacey_dist.data.tokenizer._export_difference", lambda *_: "some text")
    with pytest.warns(UserWarning, match="ids differ on 'some text'"):
        tokenizer.save(tmp_path / "export")
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == ["README.txt", "sentencepiece.model"]


def check(tokenizer: Tokenizer, path: Path, samples: Any, export: Path, exact: bool) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = processor.encode(list(samples))
    assert tokenizer.encode_batch(samples) == ids
    assert (tokenizer.vocab_size, tokenizer.end_token_id) == (len(processor), processor.eos_id())
    assert tokenizer.decode(processor.encode("a b c")) == processor.decode(processor.encode("a b c"))
    tokenizer.save(export, samples)
    if exact:
        assert AutoTokenizer.from_pretrained(export)(list(samples))["input_ids"] == ids
    else:
        assert sorted(p.name for p in export.iterdir()) == ["README.txt", "sentencepiece.model"]
        assert "AutoTokenizer cannot" in (export / "README.txt").read_text()
        with pytest.warns(UserWarning, match="cannot reproduce"):
            again = load_sentencepiece(export / "sentencepiece.model")
        assert again.fingerprint == tokenizer.fingerprint


def test_bad_sentencepiece_files(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk\.model is not a sentencepiece model"):
        load_sentencepiece(tmp_path / "junk.model")
    with pytest.raises(InputError, match=r"missing\.model cannot be read"):
        load_sentencepiece(tmp_path / "missing.model")
    with pytest.raises(InputError, match=r"x\.model has no end-of-sentence token"):
        load_sentencepiece(other_model(texts, tmp_path / "x.model", model_type="bpe", eos_id=-1))
