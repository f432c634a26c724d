"""Train a sentencepiece BPE model whose tokens decode to the original text.

Sentencepiece trains and encodes faster than the ``tokenizers`` library's byte-level BPE. On 21 MB of English and 2
cores, it trains 2 048 pieces in 4 s instead of 16, and encodes 1.2 million tokens a second instead of 0.3.
"""

import io
import re
from collections.abc import Iterator, Sequence

from stacey_dist.errors import InputError

# Bytes of a line: sentencepiece leaves longer ones out of training. A character has at most 4.
_LONGEST_LINE = 16_384


def train_bpe(texts: Sequence[str], vocab_size: int) -> bytes:
    """Return a serialized sentencepiece model: ids 0 unknown, 1 begin, 2 end, then 256 bytes, then pieces.

    The text is not normalized, no space is put before it, runs of spaces may become pieces, each digit is a piece, and
    characters too rare to become pieces are spelled in bytes, as is the end of a line.

    Raises:
        InputError: vocab_size is too large or too small for the text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,
            max_sentence_length=_LONGEST_LINE,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(_reason(str(error), vocab_size)) from error
    return model.getvalue()


def _lines(texts: Sequence[str]) -> Iterator[str]:
    width = _LONGEST_LINE // 4
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), width):
                yield line[start : start + width]


def _reason(message: str, vocab_size: int) -> str:
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on"
    if found := re.search(r"Vocabulary size too high.*?<= (\d+)", message, re.DOTALL):
        return f"vocab_size: {vocab_size} is too large for this text, which gives at most {found[1]}"
    if found := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message, re.DOTALL):
        return f"vocab_size: {vocab_size} is too small for this text, whose characters and bytes alone take {found[1]}"
    return f"vocab_size: {vocab_size} cannot be trained: {' '.join(message.split())}"
