"""Export a checkpoint as a model that `transformers` loads."""

import reprlib
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto import modeling_auto

from stacey_dist import models
from stacey_dist.checkpoint.manifest import DamagedCheckpointError, read_manifest
from stacey_dist.checkpoint.model_tensors import Contents
from stacey_dist.checkpoint.read import read_tensors, tensors
from stacey_dist.errors import SettingsError
from stacey_dist.models.export_directory import check_output, output_directory
from stacey_dist.models.untrusted_config import build_shell, model_class


def describe_model(model: Any) -> dict[str, Any] | None:
    """Return what `export_model` has to know, for a checkpoint's `extra["model"]`.

    None if the model is neither of transformers nor of stacey_dist.
    """
    for made in type(model).__mro__:  # `fully_shard` puts a class of its own in front
        if made.__module__.startswith(("transformers.models.", "stacey_dist.models.")):
            return {"class": made.__name__, "config": model.config.to_dict()}
    return None


def loader(name: str) -> str:
    """Return the class whose `from_pretrained` loads an exported model, with its package.

    Args:
        name: the model's class, as `describe_model` has it.
    """
    for kind in ("CAUSAL_LM", "IMAGE_CLASSIFICATION"):
        if name in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            return f"transformers.AutoModelFor{'CausalLM' if kind == 'CAUSAL_LM' else 'ImageClassification'}"
    return f"{'stacey_dist.models' if hasattr(models, name) else 'transformers'}.{name}"


def describe_export(name: str, directory: Path) -> str:
    """Return the line that says where an export is, and by which class it loads if by none of transformers."""
    found = loader(name)
    if found.startswith("transformers."):
        return f"model for transformers: {directory}"
    return f"model: {directory}; it loads with {found}.from_pretrained"


def export_model(
    path: Path, directory: Path, *, beside: Callable[[Path], object] | None = None, unlisted: bool = False
) -> None:
    """Write the weights of the checkpoint at `path` and its model's configuration to `directory`.

    The weights are the fp32 masters where the engine kept them. All of them are in this process's host memory.
    A failed or killed export leaves `directory` as it was, or so that it does not load: see `output_directory`.

    Args:
        path: the checkpoint.
        directory: new, empty, or of an earlier export, which is replaced.
        beside: writes what else belongs to the model (a tokenizer) to the directory that it is given.
        unlisted: as for `check_output`.

    Raises:
        DamagedCheckpointError: the checkpoint cannot be read, or says what is no model.
        SettingsError: it was saved without the model's description or with another model's, or `directory` holds
            anything else.
        OSError: `directory` cannot be written.
    """
    check_output(directory, unlisted=unlisted)
    manifest = read_manifest(path)
    described = manifest["extra"].get("model")
    if described is None:
        raise SettingsError(
            f"{path}: it does not name its model: import it again with --model, or save it with "
            "extra={'model': describe_model(model)}"
        )
    if not isinstance(described, dict) or model_class(described.get("class")) is None:
        name = described.get("class") if isinstance(described, dict) else described
        raise DamagedCheckpointError(f"{path}: {reprlib.repr(name)} is not a model of transformers or stacey_dist")
    try:
        shell = build_shell(described.get("config"), described["class"])
    except ValueError as error:
        raise DamagedCheckpointError(f"{path}: {described['class']}: {error}") from error
    kinds = {name.removeprefix("model/"): kind for name, kind in tensors(manifest).items() if name.startswith("model/")}
    _check_fit(path, kinds, shell)
    # transformers writes it into config.json, and loads weights in it.
    named = shell.named_parameters(remove_duplicate=False)
    dtypes = [getattr(torch, kinds[name][1]) for name, _ in named if name in kinds]
    if widths := [dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]:
        shell.to(reduce(torch.promote_types, widths))
    weights = read_tensors(path, [f"model/{name}" for name in kinds])
    with output_directory(directory, unlisted=unlisted) as new:
        shell.save_pretrained(new, state_dict={name.removeprefix("model/"): t for name, t in weights.items()})
        for file in new.glob("*.safetensors"):  # safetensors makes them for their owner alone, whatever the umask
            shutil.copymode(new / "config.json", file)
        if beside is not None:
            beside(new)


def _check_fit(path: Path, kinds: Contents, shell: Any) -> None:
    """Raise SettingsError naming the first tensor that differs between a checkpoint and the model that it names.

    transformers would leave such a tensor out, and begin it at random when it loads the model.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    names: dict[int, list[str]] = {}  # of a tied tensor several, of which a checkpoint has one
    for name, tensor in shell.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    absent = [name for name, *others in names.values() if not {name, *others} & kinds.keys()]
    wrong = [name for name, (shape, _) in kinds.items() if shape != shapes.get(name)]
    for name in (*absent, *wrong):
        there = kinds[name][0] if name in kinds else "absent"
        raise SettingsError(
            f"{path}: {name} is {there} in the checkpoint, but {shapes.get(name, 'absent')} in {type(shell).__name__}, "
            "the model that the checkpoint names; describe_model got another model, or the model was changed later"
        )
