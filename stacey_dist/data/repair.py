"""Prepare only the damaged parts of tokens again."""

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.blocks import encode
from stacey_dist.data.parts import ASIDE, INDEX, held_out_of, read_index
from stacey_dist.data.readahead import read_ahead
from stacey_dist.data.source import Source
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.data.verify import DamagedPart
from stacey_dist.errors import InputError


def repair_parts(directory: Path, damaged: list[DamagedPart], source: Source, tokenizer: Tokenizer) -> None:
    """Encode the documents of damaged parts again, and replace the parts.

    Of a directory of 0.1.0, which did not write where its parts begin, the index is deleted instead: nothing of it can
    be kept.

    Args:
        directory: as `prepare` returns it, locked by the caller.
        damaged: the parts.
        source, tokenizer: as for `prepare`.

    Raises:
        InputError: the text cannot be read, or gives other tokens than it did.
    """
    for part in damaged:
        print(f"{directory / part.name} {part.reason}: preparing it again", file=sys.stderr, flush=True)
    if any("start" not in part.entry for part in damaged):
        (directory / INDEX).unlink()
        return
    for part in damaged:
        _replace(directory, part, source, tokenizer)


def _replace(directory: Path, part: DamagedPart, source: Source, tokenizer: Tokenizer) -> None:
    path = directory / part.name
    temporary = path.with_name(path.name + ".tmp")
    wanted, tokens, crc = part.entry["tokens"], 0, 0
    with open(temporary, "wb") as file:
        for document in _documents(read_index(directory), part, source, tokenizer):
            content = document[: wanted - tokens]
            file.write(content.data)
            tokens, crc = tokens + len(content), zlib.crc32(content.data, crc)
            if tokens == wanted:
                break
        file.flush()
        os.fsync(file.fileno())
    if (tokens, crc) != (wanted, part.entry["crc32"]):
        temporary.unlink()
        raise InputError(
            f"{path} {part.reason}, and the text gives other tokens now than when it was made; delete {directory} to "
            "prepare all of it again"
        )
    os.replace(temporary, path)
    path.with_name(path.name + ASIDE).unlink(missing_ok=True)


def _documents(
    index: dict[str, Any], part: DamagedPart, source: Source, tokenizer: Tokenizer
) -> Iterator[NDArray[Any]]:
    """Yield the documents of a part's split from where the part begins."""
    start = part.entry["start"]
    inputs = (source.inputs if start["pass"] == "train" else source.validation_inputs) or ()
    counts = [
        (record["read"], sum(sums["documents"] for sums in record["splits"].values()))
        for record in index["inputs"][start["pass"]]
    ]
    number, skip, read = sum(documents for _, documents in counts[: start["input"]]), start["skip"], 0
    if start["input"] < len(counts) and len(set(counts[start["input"]])) == 1:
        # Every document that was read is in the parts: those before need not be encoded.
        read, number, skip = skip, number + skip, 0
    with read_ahead(inputs[start["input"] :], read) as batches:
        for batch in batches:
            for block in encode(batch, tokenizer, 0, 0):
                documents = block.documents()
                held_out = held_out_of(start["pass"], index["held_out"], number, len(documents))
                chosen = np.flatnonzero(held_out == (part.split == "validation"))
                yield from (documents[i] for i in chosen if i >= skip)
                number, skip = number + len(documents), max(0, skip - len(documents))
