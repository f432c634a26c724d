"""The tokens of a window that each token may attend to under a document mask, computed on the host.

A token attends to itself and to earlier tokens, from the first token of its document or of its sliding window,
whichever is later. So a mask is one number per token.
"""

import numpy as np
from numpy.typing import NDArray

BLOCK = 128
"""Tokens of a side of the blocks that FlexAttention computes or passes over."""


def positions(inputs: NDArray[np.int64], end_token_id: int | None) -> NDArray[np.int64]:
    """Return each token's place in its document, of the shape of `inputs` (windows, length).

    A document ends with its end token. One that begins before the window counts from the beginning of the window.

    Args:
        inputs: the tokens of windows.
        end_token_id: the id that ends a document. None: a window is one document.
    """
    index = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
    begins = np.zeros(inputs.shape, dtype=bool)
    begins[:, 1:] = inputs[:, :-1] == end_token_id
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)


def first_attended(places: NDArray[np.int64], sliding_window: int | None = None) -> NDArray[np.int32]:
    """Return the index in the window of the first token that each token attends to.

    Args:
        places: what `positions` returned.
        sliding_window: how many tokens a token attends to at most, itself among them. None: as many as there are.
    """
    index = np.arange(places.shape[1])
    first = index - places
    if sliding_window is not None:
        first = np.maximum(first, index - sliding_window + 1)
    return first.astype(np.int32)


def boundaries(places: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return where documents begin in the windows laid end to end, and at last where these end."""
    return np.append(np.flatnonzero(places == 0), places.size).astype(np.int32)


def blocks(first: NDArray[np.int32]) -> tuple[NDArray[np.int32], ...]:
    """Return the blocks of a mask as `torch.nn.attention.flex_attention.BlockMask.from_kv_blocks` takes them.

    Args:
        first: what `first_attended` returned, of shape (windows, length). It never falls within a window.

    Returns:
        For each row of blocks, the number of those that are attended to in part, of shape (windows, 1, rows), and
        their columns, of shape (windows, 1, rows, rows), in which the others follow; and the same for those that are
        attended to as a whole.
    """
    length = first.shape[1]
    rows = -(-length // BLOCK)
    row, column = np.arange(rows)[:, None], np.arange(rows)
    # The first token of a row of blocks attends furthest back, the last one least.
    last_tokens = np.minimum(np.arange(1, rows + 1) * BLOCK, length) - 1
    furthest = first[:, ::BLOCK, None] // BLOCK
    nearest = -(-first[:, last_tokens, None] // BLOCK)
    # A last row that the window does not fill counts as attended to in part, as torch counts it.
    whole = (column >= nearest) & (column < row) & (row < length // BLOCK)
    part = (column >= furthest) & (column <= row) & ~whole
    found = []
    for chosen in (part, whole):
        found += [chosen.sum(-1), np.argsort(~chosen, axis=-1, kind="stable")]
    return tuple(np.array(array[:, None], np.int32, order="C") for array in found)
