"""From a checkpoint to a model that `transformers` loads."""

import shutil
from pathlib import Path
from typing import Any

from stacey_dist.checkpoint.manifest import DamagedCheckpointError, read_manifest
from stacey_dist.checkpoint.read import read_tensors, tensors
from stacey_dist.errors import SettingsError


def describe_model(model: Any) -> dict[str, Any] | None:
    """What `export_model` has to know, for a checkpoint's `extra["model"]`; None if it is of neither library."""
    for model_class in type(model).__mro__:  # `fully_shard` puts a class of its own in front
        if model_class.__module__.startswith(("transformers.models.", "stacey_dist.models.")):
            return {"class": model_class.__name__, "config": model.config.to_dict()}
    return None


def model_class(name: str) -> Any:
    """The model of transformers or stacey_dist that has this name; None if it is of neither."""
    import transformers

    from stacey_dist import models

    found = getattr(transformers, name, None) or getattr(models, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def export_model(path: Path, directory: Path) -> None:
    """Write the weights of the checkpoint at `path` and its model's configuration to `directory`.

    The weights are the fp32 masters where the engine kept them. All of them are in this process's host memory.

    Raises:
        DamagedCheckpointError: the checkpoint cannot be read.
        SettingsError: it was saved without the model's description, or `directory` is a file.
    """
    import torch

    manifest = read_manifest(path)
    described = manifest["extra"].get("model")
    if described is None:
        raise SettingsError(
            f"{path}: it does not say which model it is of: import it again with --model, or save it with "
            "extra={'model': describe_model(model)}"
        )
    if directory.exists() and not directory.is_dir():
        raise SettingsError(f"{directory} is no directory")
    made = model_class(described["class"])
    if made is None:
        raise DamagedCheckpointError(f"{path}: {described['class']} is not a model of transformers or stacey_dist")
    config = made.config_class.from_dict(described["config"])
    if hasattr(config, "use_cache"):
        config.use_cache = True
    # The class itself: `from_config` would partition the model among the processes of a ZeRO-3 run.
    with torch.device("meta"):
        shell = made(config)
    weights = read_tensors(path, [name for name in tensors(manifest) if name.startswith("model/")])
    shell.save_pretrained(directory, state_dict={name.removeprefix("model/"): t for name, t in weights.items()})
    for file in directory.glob("*.safetensors"):  # safetensors makes them for their owner alone, whatever the umask
        shutil.copymode(directory / "config.json", file)
