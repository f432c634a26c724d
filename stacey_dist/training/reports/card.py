"""Write the model card of an export, `README.md`, from the checkpoint and its run directory."""

import os
from pathlib import Path
from typing import Any

from stacey_dist import yaml_files
from stacey_dist.files import printable
from stacey_dist.models.export import loader
from stacey_dist.training.reports.rows import is_evaluation, read_rows
from stacey_dist.version import __version__

CARD = "README.md"
PROCESSOR = "processor"
"""Where a run directory keeps what belongs to its models besides weights: a tokenizer, or the settings of images."""

_LEFT_OUT = ("run_dir", "checkpoint", "tracking", "hub", "cache_dir")
_PATHS = ("files", "validation_files", "path", "file")
_UNKNOWN = "not known"
# A file of an export, and what loads it: the variable and the class.
_BESIDE = (
    ("tokenizer_config.json", "tokenizer", "AutoTokenizer"),
    ("preprocessor_config.json", "processor", "AutoImageProcessor"),
)


def run_directory(checkpoint: Path) -> Path | None:
    """Return the directory of the run that a checkpoint lies in; None for one that was moved out of it."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == "checkpoints" else None


def write_card(directory: Path, manifest: dict[str, Any], run: Path | None) -> None:
    """Write the card of a model that lies in `directory`.

    Args:
        directory: of the export; what it holds is what the card says how to load.
        manifest: of the checkpoint that was exported.
        run: the run directory; its evaluations are in the card.
    """
    extra = manifest["extra"]
    settings = _section(extra, "config")
    task = "image-classification" if (directory / "preprocessor_config.json").exists() else "text-generation"
    rows = {
        "data": _data(_section(settings, "data")),
        "trained on": _amount(extra, settings),
        "held out": _evaluation(extra.get("step"), run),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
    }
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())
    name = extra["model"]["class"]
    title = _cell(run.name if run is not None else name)
    shown = yaml_files.dump(_shown(settings)) if settings else f"{_UNKNOWN}: the checkpoint has none\n"
    text = f"""---
library_name: transformers
pipeline_tag: {task}
tags:
- stacey
---

# {title}

A `{name}`, trained with stacey_dist {__version__}.

| | |
|---|---|
{table}

## Load it

```python
{_loading(directory, name, settings)}
```

## Settings

```yaml
{shown}```
"""
    (directory / CARD).write_text(text, encoding="utf-8")


def _loading(directory: Path, name: str, settings: dict[str, Any]) -> str:
    package, _, model = loader(name).rpartition(".")
    classes, loaded = {"model": model}, {package: [model]}
    for file, variable, kind in _BESIDE:
        if (directory / file).exists():
            classes[variable] = kind
            loaded.setdefault("transformers", []).append(kind)
            break
    lines = [f"from {source} import {', '.join(sorted(kinds))}" for source, kinds in loaded.items()]
    lines += ["", f'directory = "{_cell(_section(settings, "hub").get("push_to") or "path of this directory")}"']
    lines += [f"{variable} = {kind}.from_pretrained(directory)" for variable, kind in classes.items()]
    if len(classes) == 1 and (directory / "sentencepiece.model").exists():
        lines.append("# the tokenizer is sentencepiece.model; README.txt says why")
    return "\n".join(lines)


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section of settings, which others may have written; empty where there is none."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _data(data: dict[str, Any]) -> str:
    """Return the names of the data that a section of settings has; those of a mixture with their weights."""
    if not data:
        return _UNKNOWN
    sources = data.get("sources")
    mixed = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    texts = [f"{_data(source)}, weight {source.get('weight', 1.0)}" for source in mixed]
    for value in (_shown(data[key], key) for key in ("files", "dataset", "path") if data.get(key)):
        texts.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return "; ".join(texts) or "what the launcher brings with it"


def _amount(extra: dict[str, Any], settings: dict[str, Any]) -> str:
    if "step" not in extra:
        return _UNKNOWN
    length = _section(settings, "data").get("sequence_length")
    what = f"sequences of {length} tokens" if length else "samples"
    skipped = f", {extra['skipped_steps']} of them skipped" if extra.get("skipped_steps") else ""
    return f"{extra.get('position', '?')} {what}, in {extra['step']} updates{skipped}"


def _evaluation(step: Any, run: Path | None) -> str:
    rows = read_rows(run / "metrics.jsonl") if run is not None else []
    found = [row for row in rows if is_evaluation(row) and row["step"] == step]
    if not found:
        return f"{_UNKNOWN}: no evaluation of this update is in metrics.jsonl of the run directory"
    figures = {key: value for key, value in found[-1].items() if key[:5] == "eval_"}
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, (int, float)))


def _shown(value: Any, setting: str = "") -> Any:
    """Return settings without those of the place where the run was; of a path, its last part alone."""
    if isinstance(value, dict):
        return {key: _shown(inner, key) for key, inner in value.items() if key not in _LEFT_OUT}
    if isinstance(value, list):
        return [_shown(inner, setting) for inner in value]
    if not isinstance(value, str):
        return value
    # Elsewhere it may be a name on the hub, as in model.pretrained.
    is_path = setting in _PATHS or value.startswith((".", "~")) or os.path.isabs(value) or os.path.exists(value)
    return Path(value).name if is_path else value


def _cell(text: str) -> str:
    """Return text for a cell of a table, or a line."""
    return printable(text).replace("|", "\\|").replace('"', "'")
