"""The commands of `stacey-dist checkpoint`."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stacey_dist.checkpoint.importers.foreign import ForeignCheckpointError
from stacey_dist.checkpoint.manifest import (
    DamagedCheckpointError,
    UnknownFormatError,
    find_checkpoints,
    read_manifest,
    says_finite,
    verify,
)
from stacey_dist.errors import SettingsError, first_line
from stacey_dist.files import printable, read_json


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `stacey-dist checkpoint`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[..., int], text: str, **paths: Callable[[str], Path]) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        for path, of_kind in paths.items():
            added.add_argument(path, metavar=path.upper(), type=of_kind)
        added.set_defaults(command=command)
        return added

    add("list", list_all, "list the checkpoints of every run in or below DIR, newest first", dir=Path)
    text = "print position, size, engine and settings of the checkpoint PATH, or of the newest one of the run PATH"
    add("show", show, text, path=_checkpoint)
    add(
        "verify",
        verify_files,
        "compare every file of PATH with its checksum; exit status 1 if one is damaged",
        path=_checkpoint,
    )
    add(
        "diff",
        diff,
        "compare A and B tensor by tensor; exit status 0 only if all are equal bit for bit",
        a=_checkpoint,
        b=_checkpoint,
    )
    text = (
        "write the model of PATH to the directory OUT for transformers, with the tokenizer or image settings of its run"
    )
    add("export", export, text, path=_checkpoint, out=Path)
    text = (
        "convert PATH, saved by Accelerator.save_state (one process, DDP, FSDP2) or DeepSpeed (ZeRO-1, 2, 3) in a run "
        "with Stacey, to the checkpoint OUT"
    )
    added = add("import", import_foreign, text, path=Path, out=Path)
    added.add_argument(
        "--model",
        type=Path,
        help="a transformers model directory or config.json; needed for one process and DDP if the optimizer was made "
        "without parameter names",
    )
    added.add_argument(
        "--frozen",
        action="append",
        default=[],
        help="pattern of frozen parameters, as in 'model.embed*'; can be repeated",
    )
    added.add_argument(
        "--group",
        action="append",
        nargs="+",
        metavar="PATTERN",
        help="patterns of the parameters of one optimizer group, as in '*norm*'. Needed if --model is needed and "
        "there are several groups: once for each group, in order. A parameter is in the first group that matches",
    )
    added.add_argument("--step", type=int, help="number of updates made (default: the optimizer's count)")
    added.add_argument("--position", type=int, default=0, help="number of samples already trained on (default: 0)")


def list_all(dir: Path) -> int:
    """Print a line for each checkpoint."""
    if not dir.is_dir():
        raise SettingsError(f"{dir} is no directory")
    found = find_checkpoints(dir)
    for below, folders, _ in [] if found else os.walk(dir, onerror=_refuse):
        runs = Path(below, "checkpoints")
        inside = find_checkpoints(runs) if runs.name in folders else []
        found += inside
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or (inside and name == runs.name)))
    for path in found:
        try:
            print(f"{printable(path)}  {_summary(read_manifest(path))}")
        except DamagedCheckpointError as error:
            print(f"{printable(path)}  {describe_damage(error)}")
    if not found:
        print(f"no checkpoints under {printable(dir)}")
    return 0


def _refuse(error: OSError) -> None:
    raise error


def show(path: Path) -> int:
    """Print what the manifest says."""
    manifest = read_manifest(path)
    print(_summary(manifest))
    parts = {kind: [n for n in manifest["tensors"] if n.startswith(f"{kind}/")] for kind in ("model", "optimizer")}
    print(", ".join(f"{len(names)} {kind} tensors" for kind, names in parts.items()))
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    print(f"versions: {printable(versions)}")
    known = {True: "finite", False: "not finite", None: "not known to be finite"}
    print(f"trainable weights and optimizer states: {known[says_finite(manifest)]}")
    print(json.dumps(manifest["extra"], indent=1))
    return 0


def verify_files(path: Path) -> int:
    """Compare every file with its checksum."""
    manifest = verify(path)
    print(f"{printable(path)}: {len(manifest['files'])} files as they were written{_note_on_finiteness(manifest)}")
    return 0


def diff(a: Path, b: Path) -> int:
    """Compare two checkpoints tensor by tensor."""
    from stacey_dist.checkpoint.compare import differences

    lines = differences(a, b)
    print("\n".join(map(printable, lines)) if lines else "equal bit for bit")
    return 1 if lines else 0


def export(path: Path, out: Path) -> int:
    """Write the model as a directory that `transformers` loads."""
    manifest = verify(path)  # a damaged checkpoint is named where transformers is not installed, too
    from stacey_dist.models.export import describe_export, export_model
    from stacey_dist.models.export_directory import copy_others
    from stacey_dist.training.reports.card import PROCESSOR, run_directory, write_card

    run = run_directory(path)

    def beside(new: Path) -> None:
        if run is not None:
            copy_others(run / PROCESSOR, new)
        write_card(new, manifest, run)

    export_model(path, out, beside=beside)
    if says_finite(manifest) is False:
        print(f"warning: {path}{_note_on_finiteness(manifest)}", file=sys.stderr)
    print(describe_export(manifest["extra"]["model"]["class"], out))
    if run is None or not (run / PROCESSOR).is_dir():
        place = "the checkpoint is not in a run directory" if run is None else f"{run / PROCESSOR} is not there"
        print(f"without a tokenizer or settings of images, which a checkpoint does not hold: {place}")
    return 0


def import_foreign(
    path: Path,
    out: Path,
    model: Path | None,
    frozen: list[str],
    group: list[list[str]] | None,
    step: int | None,
    position: int,
) -> int:
    """Write what another program saved as a checkpoint of this one."""
    from stacey_dist.checkpoint.importers import import_checkpoint

    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not os.listdir(out)):
        raise ForeignCheckpointError(f"{out} is there already")
    for option, count in (("--step", step or 0), ("--position", position)):
        if count < 0:
            raise SettingsError(f"{option} {count}: it must be at least 0")
    extra: dict[str, Any] = {"position": position} | ({} if step is None else {"step": step})
    parameters = None
    if model is not None:
        shell = _build_shell(model)
        from stacey_dist.models.export import describe_model

        extra["model"] = describe_model(shell)
        names: dict[int, list[str]] = {}
        for name, param in shell.named_parameters(remove_duplicate=False):
            if not any(fnmatch(name, pattern) for pattern in frozen):
                names.setdefault(id(param), []).append(name)
        parameters = list(names.values())
    import_checkpoint(path, out, parameters=parameters, groups=group, extra=extra)
    manifest = verify(out)
    print(f"{out}: {_summary(manifest)}, from {manifest['extra']['imported_from']}")
    resume = shlex.join(["--checkpoint.resume_from", str(out)])
    print(f"to resume, with the data from sample {position:,}: {resume}")
    return 0


def describe_damage(error: DamagedCheckpointError) -> str:
    """Return what is wrong with a checkpoint, for a terminal."""
    return printable(error) if isinstance(error, UnknownFormatError) else f"damaged: {printable(error)}"


def _checkpoint(text: str) -> Path:
    """Return the path of one checkpoint, from the command line: for a run, of its newest."""
    path = Path(text)
    found: list[Path] = []
    with suppress(OSError, SettingsError):  # the command says what is wrong with it
        found = find_checkpoints(path) or find_checkpoints(path / "checkpoints")
        if not found and (path / "checkpoints").is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a run without checkpoints")
    if found:
        print(f"the newest of {path}: {found[0]}", file=sys.stderr)
    return found[0] if found else path


def _build_shell(path: Path) -> Any:
    """Return the model of a configuration of transformers, without memory for its weights."""
    try:
        config = read_json(path / "config.json" if path.is_dir() else path)
        from stacey_dist.models.untrusted_config import build_shell  # it needs transformers, which the file does not

        return build_shell(config)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--model {path}: {first_line(error)}") from error


def _summary(manifest: dict[str, Any]) -> str:
    extra, processes = manifest["extra"], manifest["processes"]
    size = sum(file["bytes"] for file in manifest["files"].values())
    position = f"after {extra['step']} updates, " if "step" in extra else ""
    engine = f"{extra['engine']}, " if "engine" in extra else ""
    size_and_place = f"{position}{size / 2**20:,.1f} MiB, {engine}{processes} process{'es' if processes > 1 else ''}"
    return printable(size_and_place + _note_on_finiteness(manifest))


def _note_on_finiteness(manifest: dict[str, Any]) -> str:
    return ", with weights or optimizer states that are not finite" if says_finite(manifest) is False else ""
