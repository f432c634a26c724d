"""Where a run goes on: choosing a checkpoint, refusing one of another run, saving the next."""

from pathlib import Path
from typing import Any

from stacey_dist.checkpoint import (
    DamagedCheckpointError,
    find_checkpoints,
    gather_tensors,
    keep_newest,
    load_checkpoint,
    save_checkpoint,
    verify,
)
from stacey_dist.errors import SettingsError
from stacey_dist.training.command_line import flatten, to_dict
from stacey_dist.training.engine import Engine
from stacey_dist.training.run import Run

# Settings that make it another run: the model, the order of the data, and what the optimizer's state is. The data
# themselves, and the tokenizer, are compared by content: their files may have moved.
_FIXED = (
    "seed",
    "model.",
    "data.sequence_length",
    "train.global_batch_size",
    "optimizer.name",
    "optimizer.variant",
    "optimizer.state_dtype",
)
_NOT_FIXED = ("model.max_position_embeddings",)


def restore(run: Run, engine: Engine, data_identity: str) -> tuple[int, int]:
    """Load the newest complete and undamaged checkpoint of the run.

    Returns the number of updates done and of updates skipped, (0, 0) without a checkpoint.

    Raises:
        SettingsError: the checkpoint was made with another model, data, seed or batch (the message lists the
            differences), or `checkpoint.resume` is never and there is one.
    """
    chosen = run.on_main(lambda: _choose(run, data_identity))
    if chosen is None:
        return 0, 0
    try:
        manifest = load_checkpoint(chosen, engine.model, engine.optimizer, verified=True)
    except DamagedCheckpointError as error:
        raise SettingsError(f"run_dir: {error}") from error
    extra = manifest["extra"]
    if extra["scaler"]:
        engine.load_scaler_state(extra["scaler"])
    run.say(f"resumed from {chosen} after {manifest['step']} updates")
    return manifest["step"], extra["skipped_steps"]


def save(
    run: Run,
    engine: Engine,
    step: int,
    *,
    data_identity: str,
    skipped: int,
    must_succeed: bool,
) -> Path | None:
    """Save a checkpoint after `step` updates and delete those beyond `checkpoint.keep_last`.

    A failed write is reported and training goes on, unless the run ends here (`must_succeed`); older checkpoints
    stay. Returns the checkpoint, None if it was not written.
    """
    extra = {
        "config": to_dict(run.config),
        "data_identity": data_identity,
        "skipped_steps": skipped,
        "scaler": engine.scaler_state(),
        "engine": engine.name,
        "processes": run.accelerator.num_processes,
    }

    tensors = gather_tensors(engine.model, engine.optimizer)

    def write() -> Path | None:
        assert tensors is not None
        directory = run.directory / "checkpoints"
        try:
            path = save_checkpoint(directory, step, tensors, extra)
        except OSError as error:
            if must_succeed:
                raise SettingsError(f"run_dir: the checkpoint after update {step} failed: {error}") from error
            print(f"the checkpoint after update {step} failed, training goes on: {error}", flush=True)
            return None
        try:
            keep_newest(directory, run.config.checkpoint.keep_last, path)
        except OSError as error:
            print(f"an older checkpoint could not be deleted, training goes on: {error}", flush=True)
        return path

    return run.on_main(write)


def _choose(run: Run, data_identity: str) -> Path | None:
    for path in find_checkpoints(run.directory / "checkpoints"):
        try:
            manifest = verify(path)
        except DamagedCheckpointError as error:
            print(f"passed over a damaged checkpoint: {error}", flush=True)
            continue
        if run.config.checkpoint.resume == "never":
            raise SettingsError(
                f"checkpoint.resume: never is not allowed for run_dir {run.directory}, which holds {path.name}; "
                "give another run_dir"
            )
        _compare(run, path, manifest["extra"], data_identity)
        return path
    return None


def _compare(run: Run, path: Path, extra: dict[str, Any], data_identity: str) -> None:
    """Refuse a checkpoint of another run; say what has changed otherwise."""
    now, saved = flatten(to_dict(run.config)), flatten(extra["config"])
    changed = {
        name: f"{name}: {saved.get(name)} there, {now.get(name)} now"
        for name in sorted(now.keys() | saved.keys())
        if now.get(name) != saved.get(name) and name != "run_dir"
    }
    fixed = [text for name, text in changed.items() if name.startswith(_FIXED) and name not in _NOT_FIXED]
    if data_identity != extra["data_identity"]:
        fixed += ["the tokens or the tokenizer are not those it was trained on"]
        fixed += [text for name, text in changed.items() if name.startswith(("data.", "tokenizer."))]
    if fixed:
        raise SettingsError(
            f"run_dir: {path} is of another run; give another run_dir, or the settings it was made with:\n  "
            + "\n  ".join(fixed)
        )
    for text in changed.values():
        print(f"changed since the checkpoint: {text}", flush=True)
