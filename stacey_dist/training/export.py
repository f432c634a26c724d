"""Export a run's model, and upload it to the Hugging Face hub if `hub.push_to` is set."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stacey_dist.checkpoint.manifest import read_manifest
from stacey_dist.errors import SettingsError, first_line
from stacey_dist.models.export import export_model
from stacey_dist.models.export_directory import MARKER
from stacey_dist.training.reports.card import write_card
from stacey_dist.training.run import Run
from stacey_dist.training.settings.config import HubConfig
from stacey_dist.version import __version__


def check_upload(hub: HubConfig) -> None:
    """Raise SettingsError if a model is to be uploaded and that cannot be, as far as it is known without the hub."""
    if hub.push_to is None:
        return
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SettingsError(f"hub.push_to: {hub.push_to} is not allowed with HF_HUB_OFFLINE, which blocks uploads")
    if huggingface_hub.get_token() is None:
        raise SettingsError(
            f"hub.push_to: {hub.push_to} needs a token of the hub; run `hf auth login`, or set HF_TOKEN"
        )


def export(run: Run, checkpoint: Path, beside: Callable[[Path], object]) -> Path:
    """Write the model of a checkpoint, as `transformers` loads it, and its card into run_dir/model; returns that path.

    `beside` writes what else belongs to the model, as a tokenizer, into the directory that it is given.
    The directory is uploaded if `hub.push_to` is set.

    The weights are the fp32 masters where the engine keeps them. The main process has all of them in host memory.
    """
    directory = run.directory / "model"

    def write_beside(new: Path) -> None:
        beside(new)
        write_card(new, read_manifest(checkpoint), run.directory)

    run.call_on_main(lambda: export_model(checkpoint, directory, beside=write_beside, unlisted=True))
    push(run, directory)
    return directory


def push(run: Run[Any], directory: Path) -> None:
    """Upload a directory to `hub.push_to`, from the main process, and print where it is then.

    What goes wrong is printed, with the command that uploads it by hand. All processes call it together.
    """
    hub = run.config.hub
    if hub.push_to is None:
        return

    def upload() -> str:
        import huggingface_hub

        complete = f"the model is complete in {directory}"
        try:
            api = huggingface_hub.HfApi(library_name="stacey_dist", library_version=__version__)
            place = api.create_repo(hub.push_to, private=hub.private or None, exist_ok=True)
            if hub.private and not api.model_info(place.repo_id).private:
                return f"hub.push_to: not uploaded: {place} is public, and hub.private is true; {complete}"
            message = f"Model after {run.config.train.max_steps} updates"
            api.upload_folder(
                repo_id=place.repo_id,
                folder_path=directory,
                ignore_patterns=[MARKER],
                delete_patterns=["model*.safetensors", "model.safetensors.index.json"],  # of a model before it
                commit_message=message,
            )
            return f"uploaded to {place}"
        except Exception as error:  # of many kinds: the network, the hub's answers, its client's checks
            private = ["--private"] if hub.private else []  # of a repository that the command creates
            command = ["hf", "upload", str(hub.push_to), str(directory), ".", "--exclude", MARKER, *private]
            return f"hub.push_to: not uploaded: {first_line(error)}; {complete}; to upload it: {shlex.join(command)}"

    run.say(run.call_on_main(upload))
