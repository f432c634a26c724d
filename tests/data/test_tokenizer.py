"""Training, export and transformers agree on every id, and what cannot be exported exactly says so."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from stacey_dist.data import Document, Tokenizer, load_pretrained, load_sentencepiece, train_sentencepiece
from stacey_dist.data.conversion import TRICKY_TEXTS
from stacey_dist.errors import InputError

VOCABULARY = 4096


@pytest.fixture(scope="module")
def texts(library: list[Document]) -> list[str]:
    return [document.text for document in library]


@pytest.fixture(scope="module")
def trained(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    directory = tmp_path_factory.mktemp("trained")
    return train_sentencepiece(iter(texts), VOCABULARY, directory), directory / "tokenizer.model"


def without_marks(text: str) -> str:
    return text.replace("▁", " ")


def test_ids_equal_sentencepiece(trained: tuple[Tokenizer, Path], texts: list[str]) -> None:
    tokenizer, model = trained
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    samples = [*TRICKY_TEXTS, *texts]
    assert tokenizer.encode_batch(samples) == processor.encode(samples)
    assert tokenizer.vocab_size == len(processor) == VOCABULARY
    assert processor.encode("a  1\n", out_type=str) == ["a", "▁▁", "1", "<0x0A>"]
    assert tokenizer.end_token_id == processor.eos_id() == 2


def test_round_trip_loses_nothing(trained: tuple[Tokenizer, Path], texts: list[str]) -> None:
    tokenizer = trained[0]
    samples = [without_marks(text) for text in [*TRICKY_TEXTS, *texts]]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(samples)] == samples
    assert tokenizer.decode([2, *tokenizer.encode_batch(["a b"])[0], 2]) == "a b"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_agrees_and_comes_back(trained: tuple[Tokenizer, Path], text: str) -> None:
    tokenizer, model = trained
    (ids,) = tokenizer.encode_batch([text])
    assert ids == sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)
    assert tokenizer.decode(ids) == without_marks(text)


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_export_gives_the_same_ids(
    trained: tuple[Tokenizer, Path], texts: list[str], tmp_path: Path, beside_a_model: bool
) -> None:
    tokenizer = trained[0]
    if beside_a_model:
        # A config.json tempts AutoTokenizer to take the model's own tokenizer class.
        LlamaConfig(vocab_size=VOCABULARY).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == trained[1].read_bytes()
    auto = AutoTokenizer.from_pretrained(tmp_path)
    samples = [*TRICKY_TEXTS, *texts[::5]]
    ids = tokenizer.encode_batch(samples)
    assert auto(samples)["input_ids"] == ids
    assert [auto.encode(text) for text in TRICKY_TEXTS] == ids[: len(TRICKY_TEXTS)]
    assert [auto.decode(i) for i in ids] == [tokenizer.decode(i) for i in ids]
    assert (auto.eos_token_id, auto.bos_token_id, auto.unk_token_id) == (2, 1, 0)
    again = load_pretrained(str(tmp_path))
    assert again.encode_batch(samples) == ids
    assert (again.vocab_size, again.end_token_id) == (VOCABULARY, 2)
    again.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(samples)["input_ids"] == ids


def test_training_is_deterministic(texts: list[str], tmp_path: Path) -> None:
    first = train_sentencepiece(texts[:60], 1000, tmp_path / "a")
    second = train_sentencepiece(iter(texts[:60]), 1000, tmp_path / "b")
    third = train_sentencepiece(texts[:61], 1000, tmp_path / "c")
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()
    assert first.fingerprint == second.fingerprint == load_sentencepiece(tmp_path / "a/tokenizer.model").fingerprint
    assert first.fingerprint != third.fingerprint
    assert len(first.fingerprint) == len(hashlib.sha256().hexdigest())


def test_training_reads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stacey_dist.data.tokenizer.TRAINING_TEXT", 10_000)
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield f"document {read} of words and more words " * 10

    train_sentencepiece(endless(), 300, tmp_path)
    assert read < 40


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(10**6, r"1000000 is too large .* at most \d+"), (100, r"100 is too small .* take \d+"), (0, "0 ")],
)
def test_vocabulary_that_does_not_fit(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(InputError, match=rf"^vocab_size: {message}"):
        train_sentencepiece(texts[:3], vocab_size, tmp_path)


def test_training_without_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text"):
        train_sentencepiece([], 1000, tmp_path)


def byte_level(directory: Path, **special: str) -> Path:
    """Save a tokenizer as GPT-2's, with a post-processor that adds a token: `encode_batch` must not."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({c: i for i, c in enumerate(alphabet)} | {"th": 256, "the": 257}, [("t", "h"), ("th", "e")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|end|>"])
    fast.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 258)])
    fast.enable_truncation(5)
    fast.enable_padding(length=5, pad_id=258, pad_token="<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(directory)
    return directory


def test_pretrained(tmp_path: Path) -> None:
    tokenizer = load_pretrained(str(byte_level(tmp_path / "a", eos_token="<|end|>")))
    assert (tokenizer.vocab_size, tokenizer.end_token_id) == (259, 258)
    (ids,) = tokenizer.encode_batch(["the tthe longer than five tokens"])
    assert ids[0] == 257
    assert 258 not in ids
    assert tokenizer.decode(ids) == "the tthe longer than five tokens"
    texts = ["", "the end<|end|>of it", *TRICKY_TEXTS]
    tokenizer.save(tmp_path / "b")
    auto = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert auto(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(texts)
    assert load_pretrained(str(tmp_path / "b")).fingerprint == tokenizer.fingerprint


def spelling(*tokens: str) -> list[str]:
    return [
        text.format(t) for t in tokens for text in ("{0}", "a {0} b", "a{0}b", "{0}{0}", " {0} ", "({0}).", "\n{0}")
    ]


def word_piece() -> PreTrainedTokenizerFast:
    """Return one as BERT's, but for the splitting at punctuation: its model has the special tokens among its words."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz[]SEPCLUNKD().,"
    words = ["[UNK]", "[SEP]", "[CLS]", "[PAD]", *letters, *(f"##{letter}" for letter in letters)]
    fast = Fast(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.decoder = decoders.WordPiece()
    fast.add_special_tokens(words[:4])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="[SEP]", cls_token="[CLS]", unk_token="[UNK]")


def unigram() -> PreTrainedTokenizerFast:
    """Return one as T5's: the model prefers its control pieces to everything else."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("ab", -3.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz</>().,\n"]
    fast = Fast(models.Unigram(pieces, unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def t5() -> Any:
    """The class makes steps of its own, whatever tokenizer.json says."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("ab", -3.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz</>().,"]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def whole_words() -> PreTrainedTokenizerFast:
    """Return one as Llama 3's, which takes a word of its vocabulary without merging; the end token is just added."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Fast(models.BPE(alphabet | {"<|end|>": 256, "<|pad|>": 257}, [], ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.add_tokens([AddedToken("<|end|>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", pad_token="<|pad|>")


SPECIAL = {
    "word pieces": (word_piece, ["[SEP]", "[CLS]", "[PAD]"], "［SEP］"),
    "unigram": (unigram, ["</s>", "<pad>"], None),
    "T5": (t5, ["</s>", "<pad>"], None),
    "whole words": (whole_words, ["<|end|>", "<|pad|>"], None),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_text_never_becomes_a_special_token(tmp_path: Path, kind: str) -> None:
    make, special, compatible = SPECIAL[kind]
    make().save_pretrained(tmp_path / "a")
    tokenizer = load_pretrained(str(tmp_path / "a"))
    reference = make()
    unwanted = set(reference.convert_tokens_to_ids(special))
    samples = spelling(*special, *([compatible] if compatible else []))
    ids = tokenizer.encode_batch(samples)
    assert not any(unwanted & set(each) for each in ids)
    assert any(unwanted & set(each) for each in reference(samples)["input_ids"])  # these samples tell
    plain = ["abc", "ab ab.", "a (b) c", ""]
    assert tokenizer.encode_batch(plain) == reference(plain, add_special_tokens=False)["input_ids"]
    tokenizer.save(tmp_path / "b")
    assert not (tmp_path / "b" / "README.txt").exists()
    auto = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert auto(samples, add_special_tokens=False)["input_ids"] == ids
    assert auto.eos_token_id == tokenizer.end_token_id == reference.eos_token_id
    again = load_pretrained(str(tmp_path / "b"))
    assert again.encode_batch(samples) == ids


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["[SEP]", "[CL", "S]", "[", "SEP", "]", " ", "a", "\n", "［", "[PAD]", "[UNK]"]))
)
def test_no_mixture_of_text_becomes_a_special_token(pieces: list[str]) -> None:
    pretrained = _cached(word_piece)
    ids = pretrained.backend_tokenizer.encode("".join(pieces), add_special_tokens=False).ids
    assert not {1, 2, 3} & set(ids)


_made: dict[Any, Any] = {}


def _cached(make: Any) -> Any:
    from stacey_dist.data.special import read_literally

    if make not in _made:
        _made[make] = read_literally(make())
    return _made[make]


def test_trained_and_given_models_read_no_special_tokens(trained: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    tokenizer, model = trained
    samples = spelling("</s>", "<s>", "<unk>", "<0x0A>")
    for each in (tokenizer, load_sentencepiece(model)):
        ids = each.encode_batch(samples)
        assert not any({0, 1, 2} & set(i) for i in ids)
        assert [each.decode(i) for i in ids] == samples
    tokenizer.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(samples)["input_ids"] == ids


def test_a_special_token_that_text_cannot_be_kept_from_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    fast = Fast(models.BPE({"a": 0, "b": 1, "$": 2}, []))
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="$").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^name_or_directory: .* text that spells '\$' becomes that token"):
        load_pretrained(str(tmp_path))


def test_an_export_that_gives_other_ids_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_pretrained(str(byte_level(tmp_path / "a", eos_token="<|end|>")))
    monkeypatch.setattr("stacey_dist.data.tokenizer._export_difference", lambda *_: "some text")
    with pytest.warns(UserWarning, match="AutoTokenizer gives other ids for 'some text' than training saw"):
        tokenizer.save(tmp_path / "b")
    assert "not quite that of training" in (tmp_path / "b" / "README.txt").read_text()


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizer"])
def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(tmp_path: Path, name: str) -> None:
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    byte_level(tmp_path, eos_token="<|end|>")
    fast = Fast.from_file(str(tmp_path / "tokenizer.json"))
    digits = pre_tokenizers.Split(Regex(r"\p{N}|t|[^\p{N}t]+"), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, fast.pre_tokenizer])
    fast.no_truncation()
    fast.no_padding()
    fast.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    expected = [encoding.ids for encoding in fast.encode_batch(TRICKY_TEXTS, add_special_tokens=False)]
    tokenizer = load_pretrained(str(tmp_path))
    assert tokenizer.encode_batch(TRICKY_TEXTS) == expected
    tokenizer.save(tmp_path / "saved", ["the"])
    assert not (tmp_path / "saved" / "README.txt").exists()


def test_the_end_token_never_stands_for_unknown_characters(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    fast = Fast(models.BPE({"<end>": 0, "a": 1, "b": 2}, [], unk_token="<end>"))
    fast.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", unk_token="<end>").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"gives no tokens|gives special tokens for text, in 'The quick brown fox"):
        load_pretrained(str(tmp_path))


def test_pretrained_without_end_token(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_pretrained(str(byte_level(tmp_path / "a")))


def test_pretrained_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "LlamaTokenizer"}])
def test_bare_model_is_refused(trained: tuple[Tokenizer, Path], tmp_path: Path, config: Any) -> None:
    """What transformers makes of a bare .model gives other ids than the model."""
    shutil.copy(trained[1], tmp_path)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"give the path of the \.model itself: .*tokenizer\.model"):
        load_pretrained(str(tmp_path))


def test_special_tokens_of_the_class_alone(tmp_path: Path) -> None:
    """The files of GPT-2 on the hub name no end token: its class does."""
    from tokenizers import Tokenizer as Fast

    byte_level(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink(missing_ok=True)
    described = json.loads((tmp_path / "tokenizer.json").read_text().replace("<|end|>", "<|endoftext|>"))
    described |= {"post_processor": None, "truncation": None, "padding": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    vocabulary = Fast.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    tokenizer = load_pretrained(str(tmp_path))
    assert tokenizer.end_token_id == vocabulary["<|endoftext|>"] == 258
    (ids,) = tokenizer.encode_batch(["the<|endoftext|>"])
    assert ids[0] == 257
    assert 258 not in ids


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_a_token_of_the_class_that_the_vocabulary_lacks_is_not_added(tmp_path: Path, model_type: str) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match="has no end-of-sequence token, which ends each document"):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize("kind", ["trained", "pretrained"])
def test_a_model_that_saw_no_begin_token_gets_none(trained: tuple[Tokenizer, Path], tmp_path: Path, kind: str) -> None:
    if kind == "trained":
        tokenizer = load_sentencepiece(trained[1])
    else:
        tokenizer = load_pretrained(str(byte_level(tmp_path / "a", eos_token="<|end|>", padding_side="left")))
    fingerprint, texts = tokenizer.fingerprint, [*TRICKY_TEXTS, "the end"]
    expected = tokenizer.encode_batch(texts)
    tokenizer.begin_with_end()
    assert tokenizer.fingerprint == fingerprint
    assert tokenizer.encode_batch(texts) == expected
    tokenizer.save(tmp_path / "b", texts)
    auto = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert auto.bos_token_id == auto.eos_token_id == tokenizer.end_token_id
    assert auto(texts)["input_ids"] == expected  # the post-processor's token is not there
    assert auto.padding_side == ("left" if kind == "pretrained" else "right")
