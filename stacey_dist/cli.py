"""The program `stacey-dist`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from stacey_dist.checkpoint.manifest import DamagedCheckpointError, find_checkpoints, read_manifest, verify


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a damaged or different checkpoint, 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="stacey-dist", description="Tools for runs of stacey_dist.")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    checkpoint = groups.add_parser("checkpoint", help="look at, verify, compare and export checkpoints")
    commands = checkpoint.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Any, text: str, *paths: str) -> None:
        added = commands.add_parser(name, help=text, description=text)
        for path in paths:
            added.add_argument(path, type=Path)
        added.set_defaults(run=function, paths=paths)

    command("list", list_checkpoints, "list the checkpoints under DIR (a run or its checkpoints), newest first", "DIR")
    command("show", show, "print position, size, engine and settings of the checkpoint PATH", "PATH")
    command("verify", verify_checkpoint, "compare every file of PATH with its checksum; 1 if one is damaged", "PATH")
    command("diff", diff, "compare A and B tensor by tensor; 0 only if all are equal to the bit", "A", "B")
    command("export", export, "write the model of PATH to the directory OUT, as transformers loads it", "PATH", "OUT")
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(*(getattr(parsed, path) for path in parsed.paths)))
    except DamagedCheckpointError as error:
        print(f"stacey-dist: damaged: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"stacey-dist: {error}", file=sys.stderr)
        return 1


def list_checkpoints(directory: Path) -> int:
    """A line for each checkpoint."""
    inside = directory / "checkpoints"
    found = find_checkpoints(inside if inside.is_dir() else directory)
    for path in found:
        try:
            print(f"{path}  {_summary(read_manifest(path))}")
        except DamagedCheckpointError as error:
            print(f"{path}  damaged: {error}")
    if not found:
        print(f"no checkpoints under {directory}")
    return 0


def show(path: Path) -> int:
    """What the manifest says."""
    manifest = read_manifest(path)
    print(_summary(manifest))
    parts = {kind: [n for n in manifest["tensors"] if n.startswith(f"{kind}/")] for kind in ("model", "optimizer")}
    print(", ".join(f"{len(names)} {kind} tensors" for kind, names in parts.items()))
    print(f"versions: {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}")
    print(json.dumps(manifest["extra"], indent=1))
    return 0


def verify_checkpoint(path: Path) -> int:
    """Every file against its checksum."""
    manifest = verify(path)
    print(f"{path}: {len(manifest['files'])} files as they were written")
    return 0


def diff(first: Path, second: Path) -> int:
    """Tensor by tensor."""
    from stacey_dist.checkpoint.compare import differences

    lines = differences(first, second)
    print("\n".join(lines) if lines else "equal to the bit")
    return 1 if lines else 0


def export(path: Path, out: Path) -> int:
    """A `transformers` model directory."""
    from stacey_dist.checkpoint.export import export_model

    verify(path)
    export_model(path, out)
    print(f"model for transformers: {out}")
    return 0


def _summary(manifest: dict[str, Any]) -> str:
    extra = manifest["extra"]
    size = sum(file["bytes"] for file in manifest["files"].values())
    position = f"after {extra['step']} updates, " if "step" in extra else ""
    engine = f"{extra['engine']}, " if "engine" in extra else ""
    processes = manifest["processes"]
    return f"{position}{size / 2**20:,.1f} MiB, {engine}{processes} process{'es' if processes > 1 else ''}"


def program() -> None:
    """What the shell starts."""
    sys.exit(main())
