"""The program `stacey-dist`."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from stacey_dist import checkpoint_commands, info
from stacey_dist.bench import command as bench
from stacey_dist.checkpoint.importers.foreign import ForeignCheckpointError
from stacey_dist.checkpoint.manifest import DamagedCheckpointError
from stacey_dist.errors import InputError, SettingsError
from stacey_dist.extras import describe_missing
from stacey_dist.files import printable
from stacey_dist.version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a damaged or different checkpoint, 2 for bad usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # These take every setting of the launcher, and so have parsers of their own.
    if arguments[:1] == ["plan"]:
        return exit_status(lambda: _plan(arguments[1:]), "stacey-dist plan", error_prefix="error: ")
    if arguments[:1] == ["prepare"]:
        return exit_status(
            lambda: _prepare(arguments[1:]), "stacey-dist prepare", error_prefix="error: ", resumable=True
        )
    options = vars(make_parser().parse_args(arguments))
    command = options.pop("command")
    return exit_status(lambda: command(**options), "stacey-dist")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of every command but `plan` and `prepare`, of which it knows the names alone."""
    parser = argparse.ArgumentParser(prog="stacey-dist", description="Tools for runs of stacey_dist.")
    parser.add_argument("--version", action="version", version=f"stacey_dist {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    checkpoint_commands.add_commands(
        commands.add_parser("checkpoint", help="list, show, verify, compare, export and import checkpoints")
    )
    bench.add_command(commands.add_parser("bench", help="measure the time of an optimizer step on this machine"))
    about = commands.add_parser(
        "info", help="print versions, devices, kernels, engines, and how to install missing extras"
    )
    about.set_defaults(command=info.print_info)
    compared = commands.add_parser("report", help="compare runs on one HTML page: results, settings and curves")
    compared.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the run_dir of a run, or of several")
    compared.add_argument(
        "--output",
        metavar="FILE.html",
        type=Path,
        default=Path("report.html"),
        help="the page to write (default: report.html)",
    )
    compared.set_defaults(command=_report)
    commands.add_parser("plan", help="estimate memory, communication and time of a run on an engine")
    commands.add_parser("prepare", help="tokenize the text of a configuration of train_llm.py before the run")
    return parser


def exit_status(
    command: Callable[[], int],
    program: str,
    *,
    error_prefix: str = "",
    resumable: bool = False,
    extra: str | None = None,
) -> int:
    """Run a command and return its exit status; print an error that a user can fix in one line.

    Args:
        command: what is run.
        program: what the line begins with.
        error_prefix: what stands before the message about a bad setting.
        resumable: whether the same command resumes what Ctrl-C interrupted.
        extra: the extra that installs all that the command imports, if it is not the missing module's own.
    """
    try:
        return command()
    except (SettingsError, InputError) as error:
        status, line = 2, f"{error_prefix}{error}"
    except DamagedCheckpointError as error:
        status, line = 1, checkpoint_commands.describe_damage(error)
    except (ForeignCheckpointError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's last flush finds no closed pipe
            return 128 + signal.SIGPIPE
        status, line = 1, printable(error)
    except ModuleNotFoundError as error:
        if (missing := describe_missing(error, extra)) is None:
            raise
        status, line = 2, missing
    except KeyboardInterrupt:
        status, line = 130, "interrupted" + ("; the same command resumes" if resumable else "")
    print(f"{program}: {line}", file=sys.stderr)
    return status


def _reader_has_gone() -> bool:
    """Return whether the reader of what is printed has closed its pipe, as `head` does when it has read enough."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _plan(arguments: list[str]) -> int:
    from stacey_dist.plan.command import plan

    print(plan(arguments))
    return 0


def _report(runs: list[Path], output: Path) -> int:
    from stacey_dist.training.reports.report import report

    return report(runs, output)


def _prepare(arguments: list[str]) -> int:
    from stacey_dist.training.prepare_command import prepare

    return prepare(arguments)


def program() -> None:
    """Run the command that the shell was given, and exit."""
    sys.exit(main())
