"""Resume a run: choose a checkpoint, and reject one of another run."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stacey_dist.checkpoint import DamagedCheckpointError, find_checkpoints
from stacey_dist.checkpoint.manifest import UnknownFormatError, says_finite
from stacey_dist.checkpoint.read import load_verified, verify_together
from stacey_dist.checkpoint.write import clear_leftovers
from stacey_dist.errors import SettingsError
from stacey_dist.models.export import describe_model
from stacey_dist.training import loss_scale
from stacey_dist.training.continuing import lr_change
from stacey_dist.training.engine import Engine
from stacey_dist.training.progress import Progress, check_progress
from stacey_dist.training.run import Run, print_line
from stacey_dist.training.settings.command_line import flatten, to_dict
from stacey_dist.training.settings.config import DATA_CHANGE
from stacey_dist.training.task import Task

# The optimizer's state is of this rule, in this dtype.
_NEVER_CHANGED = ("optimizer.name", "optimizer.state_dtype")
_NOT_OF_THE_ARCHITECTURE = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def restore(run: Run, engine: Engine, task: Task) -> Progress:
    """Load the newest complete and undamaged checkpoint of the run, or `checkpoint.resume_from`, if there is one.

    A checkpoint with weights or optimizer states that are not finite is skipped: no update from it could be applied.
    The remaining updates of `train.epochs` are computed with the current batch size.

    Raises:
        SettingsError: the checkpoint was made with another model, data, seed or batch (the message lists the
            differences), or `checkpoint.resume` is never and there is one, or all there are are damaged.
    """
    chosen = _choose(run)
    if chosen is None:
        run.resolve_max_steps(task.samples_per_epoch, 0, 0)
        return Progress()
    path, manifest = chosen
    extra = manifest["extra"]
    setting = "run_dir" if path.parent == run.directory / "checkpoints" else "checkpoint.resume_from"
    if missing := {"step", "position", "skipped_steps"} - extra.keys():
        run.fail(
            f"{setting}: {path} is not a checkpoint of a run: its manifest has no {' and no '.join(sorted(missing))}"
        )
    run.resolve_max_steps(task.samples_per_epoch, extra["step"], extra["position"])
    run.call_on_main(lambda: _check(run, path, extra, setting, engine.module, task.data_identity))
    try:
        load_verified(path, manifest, engine.model, engine.optimizer)
    except (DamagedCheckpointError, OSError) as error:
        run.fail(f"{setting}: {error}")
    progress = Progress(extra["step"], extra["position"], extra["skipped_steps"], evaluated_step=extra["step"])
    if extra.get("scaler") and engine.scaler:
        loss_scale.load(extra["scaler"], engine.scaler)
    if setting == "run_dir":  # a run that another one branches off has trackers and a best of its own
        run.tracker_ids = extra.get("trackers") or {}
        progress = replace(progress, **{key: extra[key] for key in asdict(progress) if key in extra})
    run.say(f"resumed from {path} after {progress.step} updates")
    return progress


def _choose(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to resume from, and its manifest; name those that are skipped.

    All processes call it together.
    """
    source, reasons = run.config.checkpoint.resume_from, set()
    checkpoints = run.directory / "checkpoints"

    def find() -> list[Path]:
        clear_leftovers(checkpoints)  # of a run that was killed in a save
        return find_checkpoints(checkpoints)

    found = run.call_on_main(find)
    for path in found:
        try:
            manifest = _verified(path)
        except UnknownFormatError as error:
            run.fail(f"run_dir: {error}; give another run_dir, or the version that wrote it")
        except DamagedCheckpointError as error:
            run.say(f"skipped a damaged checkpoint: {error}")
            reasons.add("damaged")
            continue
        if says_finite(manifest) is not False:
            return path, manifest
        run.say(f"warning: skipped {path}: it holds weights or optimizer states that are not finite")
        reasons.add("not finite")
    if found:
        # Starting from scratch without being asked could repeat days of work, perhaps because a disk is not mounted.
        run.fail(
            f"run_dir: every checkpoint in {checkpoints} is {' or '.join(sorted(reasons))} (each is "
            "named above); repair them, or delete them to begin anew, or give another run_dir"
        )
    if source is None:
        return None
    try:
        manifest = _verified(Path(source))
    except DamagedCheckpointError as error:
        run.fail(f"checkpoint.resume_from: {error}")
    if says_finite(manifest) is False:
        run.fail(
            f"checkpoint.resume_from: {source} holds weights or optimizer states that are not finite; give an older one"
        )
    return Path(source), manifest


def _verified(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are as they were written. Raises DamagedCheckpointError."""
    manifest = verify_together(path)
    try:
        check_progress(manifest["extra"])
    except ValueError as error:
        raise DamagedCheckpointError(f"{path}: {error}") from error
    return manifest


def _check(run: Run, path: Path, extra: dict[str, Any], setting: str, module: Any, data_identity: str) -> None:
    """Refuse a checkpoint that a run of these settings does not resume from; say what has changed otherwise.

    `setting` is the one that the checkpoint was found by.
    """
    if setting == "run_dir":
        _check_own(run, path, extra)
    _compare(run, path, extra, setting, module, data_identity)
    if setting != "run_dir" and extra["step"] >= run.config.train.max_steps:
        raise SettingsError(
            f"checkpoint.resume_from: {path} has {extra['step']} updates already; train.max_steps = "
            f"{run.config.train.max_steps} is not allowed, it must be more"
        )


def _check_own(run: Run, path: Path, extra: dict[str, Any]) -> None:
    """Refuse a checkpoint in the run's own directory that `checkpoint.resume` or `resume_from` excludes."""
    settings, source = run.config.checkpoint, run.config.checkpoint.resume_from
    if settings.resume == "never":
        raise SettingsError(
            f"checkpoint.resume: never is not allowed for run_dir {run.directory}, which holds {path.name}; "
            "give another run_dir"
        )
    # The same command, started again, resumes from its own checkpoints.
    if source is not None and path.resolve() != Path(source).resolve():
        begun = extra.get("config", {}).get("checkpoint", {}).get("resume_from")
        if begun is None or Path(begun).resolve() != Path(source).resolve():
            raise SettingsError(
                f"checkpoint.resume_from: {source} is not allowed for run_dir {run.directory}, whose newest "
                f"checkpoint {path.name} did not come from there; give another run_dir, or delete the "
                "checkpoints that are newer"
            )


def _compare(run: Run, path: Path, extra: dict[str, Any], setting: str, module: Any, data_identity: str) -> None:
    """Refuse a checkpoint of another run; say what has changed otherwise."""
    if "config" not in extra:
        print_line(f"{path} was imported: there are no settings to compare with")
        return
    allowed = run.config.checkpoint.allow_changes
    # A version that did not have a setting did what its default does.
    saved = flatten(flatten(to_dict(type(run.config)())) | flatten(extra["config"]), items=True)
    now = flatten(to_dict(run.config), items=True)
    changed = {
        name: f"{name}: {saved.get(name)} in the checkpoint, {now.get(name)} now"
        for name in sorted(now.keys() | saved.keys())
        if now.get(name) != saved.get(name) and name != "run_dir" and not name.startswith("checkpoint.")
    }
    refused = [
        text
        for name, text in changed.items()
        if name in _NEVER_CHANGED or (name in run.config.changes_to_allow and name not in allowed)
    ]
    if {"model.config", "model.pretrained"}.isdisjoint(allowed):
        refused += _changed_architecture(now, extra.get("model"), module)
    if data_identity != extra.get("data_identity") and DATA_CHANGE not in allowed:
        refused += [f"{DATA_CHANGE}: the training or held-out data are not those it was trained on"]
        refused += [text for name, text in changed.items() if name.startswith(("data.", "tokenizer."))]
    if refused:
        raise SettingsError(
            f"{setting}: {path} belongs to another run. Set another {setting}, restore the settings below, or list "
            f"them in checkpoint.allow_changes (not possible for {' and '.join(_NEVER_CHANGED)}):\n  "
            + "\n  ".join(refused)
        )
    for text in changed.values():
        print_line(f"changed since the checkpoint: {text}")
    if change := lr_change(run.config, extra["config"], extra["step"]):
        print_line(change)


def _changed_architecture(settings: dict[str, Any], saved: Any, module: Any) -> list[str]:
    """Return how the model's configuration differs from the checkpoint's, if a file gives it: a line for each entry."""
    source = settings.get("model.config") or settings.get("model.pretrained")
    described = describe_model(module) if source else None
    if described is None or not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        return []
    now, there = json.loads(json.dumps(described["config"], default=str)), saved["config"]
    return [
        f"model: {name} in {source}: {there[name]} in the checkpoint, {now[name]} now"
        for name in sorted(now.keys() & there.keys())
        if now[name] != there[name] and name not in _NOT_OF_THE_ARCHITECTURE and not name.startswith("_")
    ]
