"""Parquet files of images, turned once into Arrow files that can be memory-mapped.

`datasets.load_dataset` does this too, but takes paths for patterns: a folder named ``a[1]`` would read the folder
``a1``, and ``::`` in a name would open something else.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stacey_dist.data.lock import locked_directory
from stacey_dist.errors import SettingsError

_FORMAT_VERSION = 1
_ROWS = 1024
"""In a batch of an Arrow file: 100 MB of photos."""


def parquet_features(file: Path) -> Any:
    """Return the columns of a file as ``datasets.Features``. Raises SettingsError where it cannot be read."""
    import datasets

    # Parquet and what its metadata say of features each fail in ways of their own: all mean that it cannot be read.
    try:
        with pq.ParquetFile(file) as opened:
            return datasets.Features.from_arrow_schema(opened.schema_arrow)
    except Exception as error:
        raise _unreadable(file, error) from error


def load_parquet(files: Sequence[Path], columns: Sequence[str], features: Any, cache_dir: Path) -> Any:
    """Return a memory-mapped ``datasets.Dataset`` of some columns of some files, in their order.

    Args:
        files: their absolute paths.
        columns: which are kept.
        features: of the first file; the others' columns are cast to these.
        cache_dir: the absolute path of where the Arrow files are kept, each known by its parquet file's path, size and
            time of change.

    Raises:
        SettingsError: a file cannot be read or has other columns; ``cache_dir`` cannot be written or is full.
    """
    import datasets

    chosen = datasets.Features({name: features[name] for name in columns})
    directory = cache_dir / "parquet"
    converted = [directory / _name(file, chosen) for file in files]
    if not all(arrow.exists() for arrow in converted):
        with locked_directory(directory, "data.cache_dir", "name a data.cache_dir on another", announce=True):
            for file, arrow in zip(files, converted, strict=True):
                if not arrow.exists():
                    _convert(file, chosen, arrow)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(arrow)) for arrow in converted])


def _name(file: Path, features: Any) -> str:
    status = file.stat()
    known = [_FORMAT_VERSION, str(file), status.st_size, status.st_mtime_ns, features.to_dict()]
    return f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]}.arrow"


def _convert(file: Path, features: Any, arrow: Path) -> None:
    from datasets.table import table_cast

    temporary = arrow.with_suffix(".tmp")
    schema = features.arrow_schema
    try:
        with pq.ParquetFile(file) as opened, open(temporary, "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            missing = sorted(set(features) - set(opened.schema_arrow.names))
            if missing:
                raise SettingsError(f"data.path: {file} has no column {missing[0]!r}, which other files have")
            rows = opened.metadata.num_rows
            with tqdm(desc=f"reading {file.name}", total=rows, unit="img", dynamic_ncols=True, leave=False) as bar:
                for batch in opened.iter_batches(_ROWS, columns=list(features)):
                    table = pa.Table.from_batches([batch]).select(list(features))
                    stream.write_table(table_cast(table, schema))
                    bar.update(len(batch))
        os.replace(temporary, arrow)
    except (SettingsError, OSError):
        raise
    except Exception as error:
        raise _unreadable(file, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unreadable(file: Path, error: Exception) -> SettingsError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return SettingsError(f"data.path: {file} cannot be read: {type(error).__name__}: {reason}")
