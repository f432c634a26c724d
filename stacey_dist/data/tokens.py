"""Windows of a fixed length over prepared tokens, for next-token prediction."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.parts import SplitTokens, read_index
from stacey_dist.errors import InputError

IGNORED_LABEL = -100
"""The label of padding, which torch's cross entropy leaves out."""


class TokenStream:
    """The tokens of one split as one memory-mapped stream of N tokens, cut into windows.

    Window i predicts tokens ``[i * L + 1, i * L + L]`` from tokens ``[i * L, i * L + L - 1]``, where L is the
    sequence length. So each token but the first is predicted exactly once, whatever parts and documents it
    lies in. There are ``ceil((N - 1) / L)`` windows, the length of this object; the last may be partly
    padding.

    It can be pickled, for loader processes and the other ranks of a run, which read no index then. A part is opened
    when it is first read.

    Args:
        directory: what `prepare` returned.
        split: ``train`` or ``validation``.
        sequence_length: L, at least 1.

    Raises:
        InputError: the directory is not a complete one, the split has fewer than two tokens, or sequence_length is
            below 1.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int) -> None:
        if sequence_length < 1:
            raise InputError(f"sequence_length: {sequence_length} is not allowed; it must be at least 1")
        self.directory = Path(directory)
        self.split = split
        self.sequence_length = sequence_length
        index = read_index(self.directory)
        if split not in index["splits"]:
            raise InputError(f"{directory} has no split {split!r}, only {', '.join(index['splits'])}")
        self._tokens = SplitTokens.of_index(self.directory, split, index)
        self.vocab_size: int = index["vocab_size"]
        self.end_token_id: int = index["end_token_id"]
        self.tokens = len(self._tokens)
        if self.tokens < 2:
            raise InputError(f"{directory}: {split} has {self.tokens} tokens; predicting one takes at least 2")

    @property
    def identity(self) -> str:
        """A text that differs where tokens, tokenizer or the number of skipped records differ; reads the index."""
        index = read_index(self.directory)
        parts = index["splits"][self.split]["parts"]
        content = [{key: part[key] for key in ("name", "tokens", "crc32") if key in part} for part in parts]
        skipped = index["skipped"]["count"]
        return json.dumps(
            [index["tokenizer"], self.split, content] + ([{"skipped": skipped}] if skipped else []), sort_keys=True
        )

    @property
    def total_labels(self) -> int:
        """Number of predicted tokens in all windows: N - 1."""
        return self.tokens - 1

    def __len__(self) -> int:
        return -(-self.total_labels // self.sequence_length)

    def label_count(self, i: int) -> int:
        """Return how many labels of window i are not padding, without reading it.

        Raises:
            IndexError: i is not in [0, len(self)).
        """
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return min(self.sequence_length, self.total_labels - i * self.sequence_length)

    def window(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (inputs, labels) of window i, each int64 of length L.

        ``labels[j]`` is the token after ``inputs[j]``. Padding is the end token in inputs and -100 in labels.

        Raises:
            IndexError: i is not in [0, len(self)).
            InputError: an id is not in the vocabulary, or a part is missing or has another size than recorded.
        """
        count = self.label_count(i)
        start = i * self.sequence_length
        tokens = self._tokens.read(start, start + count + 1).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            # An embedding on a GPU would end the process without a word about the data.
            raise InputError(
                f"{self.directory}: {self.split} holds the token id {tokens.max()}, and the vocabulary ends at "
                f"{self.vocab_size - 1}: it is damaged; `stacey-dist prepare` prepares damaged parts again"
            )
        inputs = np.full(self.sequence_length, self.end_token_id, dtype=np.int64)
        labels = np.full(self.sequence_length, IGNORED_LABEL, dtype=np.int64)
        inputs[:count], labels[:count] = tokens[:-1], tokens[1:]
        return inputs, labels
