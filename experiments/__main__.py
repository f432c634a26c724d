"""`python -m experiments reproduce NAME` and `python -m experiments tune SWEEP`, in the repository's root."""

import argparse
import sys
from pathlib import Path

from stacey_dist.cli import exit_status


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 for training that failed, 2 for bad usage."""
    options = vars(make_parser().parse_args(arguments))
    command = options.pop("command")

    def run() -> int:
        from experiments.trial import TrialError  # within `exit_status`, which names the extra if a package is missing

        try:
            status: int = command(**options)
        except TrialError as error:
            print(f"experiments: {error}", file=sys.stderr)
            return 1
        return status

    return exit_status(run, "experiments", resumable=True, extra="experiments")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description="The paper's experiments, and the search for settings."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    again = commands.add_parser("reproduce", help="run an experiment of the paper again; `reproduce list` names them")
    again.add_argument("name", metavar="NAME", help="an experiment, or list")
    again.add_argument("--scale", help="one that `reproduce list` shows for it; the first if not given")
    again.add_argument("--seeds", type=int, help="repeats, each with a seed of its own; the scale's own if not given")
    again.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the results; the same directory resumes (default: runs/NAME)",
    )
    again.add_argument("--workers", type=int, default=1, help="number of parts computed in parallel (default: 1)")
    again.add_argument("--data", help="what to train on in place of the experiment's own data, where it trains")
    again.set_defaults(command=reproduce)
    search = commands.add_parser("tune", help="search settings as a W&B sweep file states them, with Optuna")
    search.add_argument("sweep", metavar="SWEEP", type=Path, help="the file, as configs/sweeps has them")
    search.add_argument(
        "--trials", type=int, default=20, help="total number of runs; a larger number extends the search (default: 20)"
    )
    search.add_argument("--workers", type=int, default=1, help="number of parallel runs (default: 1)")
    search.add_argument("--seed", type=int, default=0, help="seed of the search (default: 0)")
    search.add_argument("--data", help="what to train on in place of the configuration's data")
    search.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the runs; the same directory resumes (default: runs/tune-DIRECTORY-FILE)",
    )
    search.set_defaults(command=tune)
    return parser


def reproduce(name: str, scale: str | None, seeds: int | None, out: Path | None, workers: int, data: str | None) -> int:
    """Run an experiment of the paper, or list them."""
    from experiments import framework, registry

    if name == "list":
        print("\n".join(registry.lines()))
        return 0
    experiment = registry.find(name)
    directory = Path("runs") / name if out is None else out
    framework.reproduce(experiment, directory, scale=scale, seeds=seeds, workers=workers, data=data)
    print((directory / "table.md").read_text(), end="")
    print(f"\nresults.json, table.md and figures: {directory}")
    return 0


def tune(sweep: Path, trials: int, workers: int, seed: int, data: str | None, out: Path | None) -> int:
    """Search the best settings of a sweep."""
    from experiments import tuning

    directory = Path("runs") / f"tune-{sweep.absolute().parent.name}-{sweep.stem}" if out is None else out
    tuning.search(sweep, directory, trials=trials, workers=workers, seed=seed, data=data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
