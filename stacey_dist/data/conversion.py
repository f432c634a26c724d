"""Convert a sentencepiece model to a tokenizer of the ``tokenizers`` library, which ``transformers`` loads.

Only exports need it: sentencepiece itself encodes the training text, at 1.3 to 1.6 times the tokens per second of the
converted tokenizer. A model is converted only if ids stay the same: features that ``tokenizers`` lacks are rejected,
and ids are compared on texts that tokenizers disagree on.
"""

import random
from typing import Any

TRICKY_TEXTS: tuple[str, ...] = (
    "",
    " ",
    "   ",
    "\n",
    "\t",
    "a",
    " a",
    "a ",
    "  two leading, two trailing  ",
    "runs  of   spaces    and\ttabs\t\there",
    "    def f(x):\n        return x  # four, eight\n\n\n",
    "line\r\nline\rline\x0b\x0c\x1c\x85\u2028\u2029line",
    "\x00\x01\x7f nul and control",
    "--------====================aaaaaaaaaaaaaaaaaaaaaaaaa.............",
    "aa aaa aaaa aaaaa abab ababab ababababab hahahahaha",
    "0 1 12 123 1234567890 3.14159 1,000,000 0x1F",
    "naïve café e\u0301 n\u0303 Å A\u030a \u0301 leading mark ﬁ ﬂ ½ ² ™ …",
    "Ὀδυσσεύς Привет, мир! שָׁלוֹם عربي हिन्दी ไทย 한국어 \u1112\u1161\u11ab",
    "日本語の文章。中文，全角 ＡＢＣ　１２３ ｶﾞ カ\u3099",
    "😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ☃️ \U0001f9ff 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠀋",
    "zero\u200bwidth\u200cjoin\u200der \u00a0nbsp \u00ad\ufeff bom \ufffd \u3000wide",
    "\ue000\uf8ff\U000f0000 private use, unassigned \u0378",
    "▁ ▁▁ lower ▁one▁ eighth▁",
    "<s> </s> <unk> <pad> <0x0A> <0x41> <|endoftext|> [UNK] <mask> a</s>b",
    "Tiếng Việt nói ở Việt Nam, Tie\u0302\u0301ng Vie\u0323\u0302t, a\u0302\u0301\u0323\u0308 z\u0335\u0336",
    "a\u00a0\u0301b \u0301\u0302 c\u0327\u0301 \u0344 \u0f77 \u0958 \u1e9b\u0323 \u1100\u1161\u11a8\u302e",
    "\ufb2a\u05b8\u05dc\ufb35\u05b9\u05dd \ufee3\u064e\ufeae\ufea3\u064e\ufe92\u064b\ufe8e \ufdfa \ufefb",
    "\ufb00\ufb03\ufb06 e\ufb01e",
    "① ⑳ ㎏ ㍿ ㌀ Ⅷ ℡ № ª º ¼ ⁵ ₂ ℌ ﹏ ﹣ ｡ ﾞ ﾟ ￦ \u2126 \u212b \u2003\u2009\u202f\u205f\u1680 \u0340\u0341",
    "http://example.com/?q=%20&x=1#y ~/.bashrc C:\\dir `x` \"q\" 'q' “q” ‘q’ — –",
)
"""Texts on which tokenizers are known to disagree."""


class Inconvertible(Exception):
    """The ``tokenizers`` library cannot give the model's ids; the message says why."""


def convert(model: bytes) -> Any:
    """Return a ``tokenizers.Tokenizer`` with the ids of a serialized sentencepiece model.

    Text that spells a control symbol is text, as in sentencepiece.

    Raises:
        Inconvertible: it is no BPE model, it has a feature that ``tokenizers`` lacks, or ids differ.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    _refuse(proto)
    tokenizer = Tokenizer(_bpe(proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto)
    kinds = proto.SentencePiece
    special = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    symbols = [p.piece for p in proto.pieces if p.type == kinds.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in symbols])
    tokenizer.encode_special_tokens = True
    _compare(tokenizer, SentencePieceProcessor(model_proto=model), symbols[:64])
    return tokenizer


def _compare(tokenizer: Any, processor: Any, symbols: list[str]) -> None:
    """Raise Inconvertible unless both encode some texts alike: tricky ones, all pieces in two orders, the symbols."""
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    shuffled = random.Random(0).sample(pieces, len(pieces))
    texts = [*TRICKY_TEXTS, *(between.join(shuffled).replace("▁", " ") for between in ("", " "))]
    texts += [text for s in symbols for text in (s, f"a {s} b", f"a{s}{s}b", f" {s} ")]
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, processor.encode(texts), found, strict=True):
        if ids != encoding.ids:
            raise Inconvertible(f"ids differ on {text[:40]!r}")


def _refuse(proto: Any) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        # Of unigram models, sentencepiece adds the scores in float32 and `tokenizers` in float64: some ids differ.
        "it is not a BPE model": trainer.model_type != trainer.BPE,
        "it puts the space after a word": trainer.treat_whitespace_as_suffix,
        "it does not mark spaces": not normalizer.escape_whitespaces,
        "it has unused pieces": any(piece.type == proto.SentencePiece.UNUSED for piece in proto.pieces),
        # `tokenizers` applies such a table to clusters of characters: it loses marks of letters with several.
        "it normalizes text by a table of characters": bool(normalizer.precompiled_charsmap),
        "it normalizes decoded text": bool(proto.denormalizer_spec.precompiled_charsmap),
    }
    for reason, holds in reasons.items():
        if holds:
            raise Inconvertible(reason)


def _bpe(proto: Any) -> Any:
    from tokenizers import models

    scores = {p.piece: p.score for p in proto.pieces if p.type == proto.SentencePiece.NORMAL}
    # Sentencepiece joins any two neighbours that make a piece, the best score first: every way to split a piece is a
    # merge, in the order of scores.
    merges = [
        (-score, at, piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    merges.sort(key=lambda merge: merge[:2])
    return models.BPE(
        {piece.piece: i for i, piece in enumerate(proto.pieces)},
        [(left, right) for _, _, left, right in merges],
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if spec.remove_extra_whitespaces:
        # After spaces were marked: a mark that the text itself ends with goes too.
        steps.append(normalizers.Replace(Regex(r"▁+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace("▁", " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
