"""The program `stacey-dist`."""

import argparse
import json
import os
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
from stacey_dist.errors import SettingsError
from stacey_dist.extras import message
from stacey_dist.files import printable
from stacey_dist.version import __version__

BENCH_CASES = ("flat", "llama_100m", "tiny")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a damaged or different checkpoint, 2 for bad usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # These take every setting of the launcher, and so have parsers of their own.
    if arguments[:1] == ["plan"]:
        return exit_status(lambda: _plan(arguments[1:]), "stacey-dist plan", refused="error: ")
    if arguments[:1] == ["prepare"]:
        return exit_status(lambda: _prepare(arguments[1:]), "stacey-dist prepare", refused="error: ", resumable=True)
    parsed = make_parser().parse_args(arguments)
    return exit_status(lambda: int(parsed.run(*(getattr(parsed, name) for name in parsed.arguments))), "stacey-dist")


def _plan(arguments: list[str]) -> int:
    from stacey_dist.plan.command import main

    return main(arguments)


def _prepare(arguments: list[str]) -> int:
    from stacey_dist.training.prepare_command import prepare

    return prepare(arguments)


def exit_status(
    work: Callable[[], int], program: str, *, refused: str = "", resumable: bool = False, extra: str | None = None
) -> int:
    """Run a command and return its exit status; print an error that a user can mend in one line."""
    try:
        return work()
    except DamagedCheckpointError as error:
        print(f"{program}: {_what_is_wrong(error)}", file=sys.stderr)
        return 1
    except SettingsError as error:
        print(f"{program}: {refused}{error}", file=sys.stderr)
        return 2
    except (ForeignCheckpointError, OSError) as error:
        print(f"{program}: {printable(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (missing := message(error, extra)) is None:
            raise
        print(f"{program}: {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if resumable else ""
        print(f"{program}: interrupted{goes_on}", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command but `plan` and `prepare`, of which it knows the names alone."""
    parser = argparse.ArgumentParser(prog="stacey-dist", description="Tools for runs of stacey_dist.")
    parser.add_argument("--version", action="version", version=f"stacey_dist {__version__}")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    checkpoint = groups.add_parser("checkpoint", help="look at, verify, compare and export checkpoints")
    commands = checkpoint.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Any, text: str, *paths: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        for path in paths:
            added.add_argument(path, type=Path if path in ("DIR", "OUT") or name == "import" else _checkpoint)
        added.set_defaults(run=function, arguments=list(paths))
        return added

    command("list", list_checkpoints, "list the checkpoints under DIR (a run or its checkpoints), newest first", "DIR")
    command("show", show, "print position, size, engine and settings of the checkpoint PATH", "PATH")
    command("verify", verify_checkpoint, "compare every file of PATH with its checksum; 1 if one is damaged", "PATH")
    command("diff", diff, "compare A and B tensor by tensor; 0 only if all are equal to the bit", "A", "B")
    command("export", export, "write the model of PATH to the directory OUT, as transformers loads it", "PATH", "OUT")
    added = command("import", import_foreign, _IMPORT, "PATH", "OUT")
    added.add_argument("--model", type=Path, help="a transformers model directory or config.json; needed for DDP")
    added.add_argument("--frozen", action="append", default=[], help="names of frozen parameters, as in 'model.embed*'")
    added.add_argument(
        "--group",
        action="append",
        nargs="+",
        metavar="PATTERN",
        help="the parameters of one of the optimizer's groups, as in '*norm*'; once for each group, in their order, "
        "where there are several and the state has no names (DDP). The first group with a pattern that fits counts",
    )
    added.add_argument("--step", type=int, help="updates made; the optimizer's own count if not given")
    added.add_argument("--position", type=int, default=0, help="samples already trained on (0)")
    added.set_defaults(arguments=["PATH", "OUT", "model", "frozen", "group", "step", "position"])
    from_bench = groups.add_parser("bench", help="measure what a step of the optimizers costs here")
    from_bench.add_argument("--case", action="append", choices=BENCH_CASES, help="one of them; all if not given")
    from_bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    from_bench.add_argument("--rounds", type=int, default=9, help="how often each of a pair steps in a process (9)")
    from_bench.add_argument("--processes", type=int, default=3, help="how many measure each pair (3)")
    from_bench.add_argument("--slow", action="store_true", help="measure the plain rule too, also compiled")
    from_bench.add_argument("--json", type=Path, help="a file for the figures")
    from_bench.set_defaults(run=measure, arguments=["case", "device", "rounds", "slow", "json", "processes"])
    groups.add_parser("info", help="versions, devices, kernels, engines, and what installs the rest").set_defaults(
        run=info, arguments=[]
    )
    groups.add_parser("plan", help="memory, communication and time of a run on an engine, before it is started")
    groups.add_parser("prepare", help="tokenize the text of a configuration of train_llm.py before the run")
    return parser


def _checkpoint(text: str) -> Path:
    """The path of one checkpoint, from the command line."""
    path = Path(text)
    holds = False
    with suppress(OSError):  # the command says what is wrong with it
        holds = bool(find_checkpoints(path)) or (path / "checkpoints").is_dir()
    if holds:
        raise argparse.ArgumentTypeError(f"{path} holds checkpoints and is none: name one that `list {path}` shows")
    return path


def list_checkpoints(directory: Path) -> int:
    """A line for each checkpoint."""
    if not directory.is_dir():
        raise SettingsError(f"{directory} is no directory")
    inside = directory / "checkpoints"
    found = find_checkpoints(inside if inside.is_dir() else directory)
    for path in found:
        try:
            print(f"{path}  {_summary(read_manifest(path))}")
        except DamagedCheckpointError as error:
            print(f"{path}  {_what_is_wrong(error)}")
    if not found:
        print(f"no checkpoints under {directory}")
    return 0


def _what_is_wrong(error: DamagedCheckpointError) -> str:
    return printable(error) if isinstance(error, UnknownFormatError) else f"damaged: {printable(error)}"


def show(path: Path) -> int:
    """What the manifest says."""
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


def verify_checkpoint(path: Path) -> int:
    """Every file against its checksum."""
    manifest = verify(path)
    print(f"{path}: {len(manifest['files'])} files as they were written{_if_not_finite(manifest)}")
    return 0


def diff(first: Path, second: Path) -> int:
    """Tensor by tensor."""
    from stacey_dist.checkpoint.compare import differences

    lines = differences(first, second)
    print("\n".join(map(printable, lines)) if lines else "equal to the bit")
    return 1 if lines else 0


def export(path: Path, out: Path) -> int:
    """A `transformers` model directory."""
    from stacey_dist.models.export import export_model
    from stacey_dist.models.export_directory import check_output

    check_output(out)
    verify(path)
    export_model(path, out)
    print(f"model for transformers: {out}")
    return 0


_IMPORT = (
    "write what Accelerator.save_state (DDP, FSDP2) or DeepSpeed (ZeRO-1, 2, 3) saved in PATH, of a run that used "
    "Stacey, as the checkpoint OUT"
)


def import_foreign(
    path: Path,
    out: Path,
    model: Path | None,
    frozen: list[str],
    groups: list[list[str]] | None,
    step: int | None,
    position: int,
) -> int:
    """Another maker's checkpoint as one of ours."""
    from stacey_dist.checkpoint.importers import import_checkpoint

    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not os.listdir(out)):
        raise ForeignCheckpointError(f"{out} is there already")
    for option, count in (("--step", step or 0), ("--position", position)):
        if count < 0:
            raise SettingsError(f"{option} {count}: it must be at least 0")
    extra: dict[str, Any] = {"position": position} | ({} if step is None else {"step": step})
    parameters = None
    if model is not None:
        from stacey_dist.models.export import describe_model

        shell = _shell(model)
        extra["model"] = describe_model(shell)
        names: dict[int, list[str]] = {}
        for name, param in shell.named_parameters(remove_duplicate=False):
            if not any(fnmatch(name, pattern) for pattern in frozen):
                names.setdefault(id(param), []).append(name)
        parameters = list(names.values())
    import_checkpoint(path, out, parameters=parameters, groups=groups, extra=extra)
    manifest = verify(out)
    print(f"{out}: {_summary(manifest)}, from {manifest['extra']['imported_from']}")
    print(f"to go on, with the data from sample {position:,}: --checkpoint.resume_from {out}")
    return 0


def info() -> int:
    """What a report of a problem needs."""
    from stacey_dist.info import lines

    print("\n".join(lines()))
    return 0


def measure(
    cases: list[str] | None, device: str, rounds: int, slow: bool, json_file: Path | None, processes: int
) -> int:
    """Time the optimizers."""
    import torch

    from stacey_dist.bench import bench

    if rounds < 1:
        raise SettingsError(f"--rounds must be at least 1, got {rounds}")
    if processes < 1:
        raise SettingsError(f"--processes must be at least 1, got {processes}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no GPU here")
    return bench(cases or list(BENCH_CASES), device, rounds, slow, json_file, processes)


def _shell(path: Path) -> Any:
    """The model of a configuration of transformers, without memory for its weights."""
    from stacey_dist.files import read_json
    from stacey_dist.models.from_config import build_shell

    try:
        return build_shell(read_json(path / "config.json" if path.is_dir() else path))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--model {path}: {(str(error).strip().splitlines() or [''])[0]}") from error


def _summary(manifest: dict[str, Any]) -> str:
    extra = manifest["extra"]
    size = sum(file["bytes"] for file in manifest["files"].values())
    position = f"after {extra['step']} updates, " if "step" in extra else ""
    engine = f"{extra['engine']}, " if "engine" in extra else ""
    processes = manifest["processes"]
    several = "es" if processes > 1 else ""
    size_and_place = f"{position}{size / 2**20:,.1f} MiB, {engine}{processes} process{several}"
    return printable(size_and_place + _if_not_finite(manifest))


def _if_not_finite(manifest: dict[str, Any]) -> str:
    return ", with weights or optimizer states that are not finite" if says_finite(manifest) is False else ""


def program() -> None:
    """What the shell starts."""
    sys.exit(main())
