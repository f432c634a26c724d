"""`stacey-dist plan`: its options, and what they make of a configuration."""

import argparse
import difflib
import json
import shlex
from dataclasses import replace
from typing import Any, NoReturn

from stacey_dist.errors import SettingsError, unknown
from stacey_dist.plan.hardware import GB, GPUS, Gpu, find_gpu
from stacey_dist.plan.job import Job
from stacey_dist.plan.memory import ENGINES
from stacey_dist.plan.model import planned_model
from stacey_dist.plan.plans import make_plan, propose_plans
from stacey_dist.plan.report import NOT_MEASURED, as_dict, proposals, table
from stacey_dist.training.launchers import LLM

# Options that are short for a setting of the configuration.
SHORT = {
    "--mixed-precision": "train.mixed_precision",
    "--micro-batch-size": "train.micro_batch_size",
    "--global-batch-size": "train.global_batch_size",
    "--sequence-length": "data.sequence_length",
    "--optimizer": "optimizer.name",
}
_COLUMNS = 100
_LARGEST_FIGURE = 1_000_000
# Options for a GPU's figures: the field of `Gpu`, in units of 10^9, and the help.
FIGURES = {
    "--memory-gb": ("memory", "memory of a GPU, in 10^9 bytes"),
    "--intra-gbs": ("intra", "bandwidth from a GPU to others in its node, one direction"),
    "--inter-gbs": ("inter", "a GPU's share of its node's bandwidth to other nodes, one direction"),
    "--host-gbs": ("host", "bandwidth from a GPU to host memory, one direction"),
}


def plan(arguments: list[str]) -> str:
    """Return what `stacey-dist plan` prints for these arguments.

    Raises SettingsError for options and settings that are not known, not allowed, or do not go together.
    """
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    _check_names(parser, others)
    config = LLM.parse(_arguments(options) + others, "stacey-dist plan")
    _check(options)
    gpu = _gpu(options)
    room = gpu.memory * (1 - options.margin)
    if config.optimizer.name == "muon":
        raise SettingsError("optimizer.name: muon is not planned yet; adamw needs somewhat more memory")
    if config.model.attention == "eager" or config.data.document_mask:
        setting, value = ("data.document_mask", "true") if config.data.document_mask else ("model.attention", "eager")
        raise SettingsError(
            f"{setting}: {value} is not planned: in each layer it keeps masks or scores of length^2 numbers for each "
            "window, which have no formula here; leave it out of the plan"
        )
    if options.search:  # it is what is searched
        config.train.micro_batch_size = None
    model = planned_model(config, options.vocab_size)
    job = Job(config, model, _engine(options), options.nodes, options.gpus_per_node)
    if options.search:
        plans = propose_plans(job, gpu, room)
    else:
        peer = config.optimizer.name != "adamw" and config.model.dtype == "float32"
        plans = [make_plan(each, gpu) for each in ([job, job.with_adamw()] if peer else [job])]
    if options.json:
        kind = "proposals" if options.search else "plans"
        return json.dumps({kind: [as_dict(p, gpu, room) for p in plans], "not_measured": NOT_MEASURED}, indent=1)
    command = _command(options, others, plans[0].job if plans else job)
    return proposals(plans, gpu, room, job, command) if options.search else table(plans, gpu, room, command)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stacey-dist plan",
        allow_abbrev=False,
        description="Estimate the memory and time of a training run on an engine. Any setting of train_llm.py is also "
        "an option, as in --optimizer.state_dtype float32.",
        epilog=f"{NOT_MEASURED} A peak is an estimate: keep a --margin. Defaults for links, per GPU, are its maker's "
        f"figures: {'; '.join(_links(gpu) for gpu in GPUS.values())}. See docs/how-to/plan.md.",
    )
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="a configuration of train_llm.py, as in configs/llm; can be repeated, later ones win (default: none)",
    )
    add("--engine", metavar="NAME", help=f"one of {', '.join(ENGINES)} (default: fsdp2; single on one GPU)")
    add("--gpu", default="h100-80gb", metavar="NAME", help=f"one of {', '.join(GPUS)} (default: h100-80gb)")
    add("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="number of GPUs per node (default: 8)")
    add(
        "--offload",
        action="store_true",
        help="with zero3: offload weights, optimizer states and the update to the host",
    )
    add("--search", action="store_true", help="propose engine, micro-batch and accumulation")
    add("--json", action="store_true", help="print JSON, in bytes and seconds")
    for option, setting in SHORT.items():
        add(option, dest=setting, metavar="VALUE", help=f"short for --{setting}")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="override train.gradient_checkpointing")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="vocabulary size; needed if the plan cannot tell it from the tokenizer",
    )
    for option, (figure, text) in FIGURES.items():
        add(option, dest=figure, type=float, metavar="GB" if figure == "memory" else "GB/S", help=text)
    add(
        "--efficiency",
        metavar="LOW,HIGH",
        help="range of the fraction of peak FLOP/s (default: by GPU, from published runs)",
    )
    add("--margin", type=float, default=0.1, metavar="SHARE", help="fraction of the memory to keep free (default: 0.1)")
    return parser


def _links(gpu: Gpu) -> str:
    return (
        f"{gpu.name} {gpu.intra / GB:g} GB/s in a node, {gpu.inter / GB:g} between nodes, {gpu.host / GB:g} to the host"
    )


def _check_names(parser: argparse.ArgumentParser, others: list[str]) -> None:
    """Raise SettingsError for an unknown option without a dot; those with one are settings, which are checked later."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in others:
        name = argument.partition("=")[0]
        if name.startswith("--") and "." not in name and name not in ("--seed", "--run_dir"):
            close = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.5)
            raise SettingsError(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))


def _command(options: argparse.Namespace, others: list[str], job: Job) -> str:
    """Return the command that starts the run of a job, to be pasted on a machine with a checkout."""
    engine = "gpu" if job.engine == "single" else job.engine
    launch = ["accelerate", "launch", "--config_file", f"configs/accelerate/{engine}.yaml"]
    if job.engine == "hsdp" or job.ranks != (1 if job.engine == "single" else 8):  # what the files say
        launch += ["--num_processes", str(job.ranks)]
    if job.engine == "hsdp":  # a copy of the weights on each node
        launch += ["--parallelism_config_dp_replicate_size", str(job.nodes)]
        launch += ["--parallelism_config_dp_shard_size", str(job.gpus_per_node)]
    if job.nodes > 1:
        launch += ["--num_machines", str(job.nodes), "--machine_rank", "RANK", "--main_process_ip", "HOST"]
    settings = _arguments(options)
    if job.precision == "no" and job.config.train.mixed_precision is None:  # the files say bf16
        others = [*others, "--train.mixed_precision", "no"]
    if options.search:  # last, so that it wins over what the user gave
        checkpointing = str(job.config.train.gradient_checkpointing).lower()
        found = ["--train.micro_batch_size", str(job.micro_batch), "--train.gradient_checkpointing", checkpointing]
        others = [*others, *found]
    lines = [""]
    parts: list[str] = []  # an option with its value, which no line break parts
    for word in [*launch, "train_llm.py", *settings, *others]:
        if not parts or word.startswith("--") or word == "train_llm.py":
            parts.append(shlex.quote(word))
        else:
            parts[-1] += f" {shlex.quote(word)}"
    for part in parts:
        if len(lines[-1]) + len(part) > _COLUMNS:
            lines.append("")
        lines[-1] += f" {part}"
    return " \\\n ".join(lines)[1:]


def _arguments(options: argparse.Namespace) -> list[str]:
    """Return the options of the launcher that the plan's own stand for."""
    arguments = [word for file in options.config for word in ("--config", file)]
    for setting in SHORT.values():
        if (value := vars(options)[setting]) is not None:
            arguments += [f"--{setting}", value]
    if options.gradient_checkpointing is not None:
        arguments += ["--train.gradient_checkpointing", str(options.gradient_checkpointing).lower()]
    return arguments


def _check(options: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node", "vocab_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')}: {value} is not allowed; it must be >= 1")
    if not 0 <= options.margin < 1:
        raise SettingsError(f"--margin: {options.margin} is not allowed; it must be within [0, 1)")
    if options.search and options.engine:
        raise SettingsError(f"--engine: {options.engine} is not allowed with --search, which tries all engines")


def _engine(options: argparse.Namespace) -> str:
    several = "ddp" if options.search else "fsdp2"  # a search begins with an engine that every optimizer runs on
    name = options.engine or ("single" if options.nodes * options.gpus_per_node == 1 else several)
    if name not in ENGINES:
        raise unknown("--engine", name, ENGINES, spelled=name.lower().replace("-", "_"), cutoff=0.4)
    if options.offload and name not in ("zero3", "zero3_offload"):
        raise SettingsError(f"--offload: it goes with --engine zero3, not {name}")
    return "zero3_offload" if options.offload else name


def _gpu(options: argparse.Namespace) -> Gpu:
    changes: dict[str, Any] = {}
    for option, (figure, _) in FIGURES.items():
        if (value := vars(options)[figure]) is not None:
            if not 0 < value <= _LARGEST_FIGURE:
                allowed = f"it must be > 0, and at most {_LARGEST_FIGURE:,}"
                raise SettingsError(f"{option}: {value} is not allowed; {allowed}")
            changes[figure] = value * GB
    if options.efficiency is not None:
        changes["efficiency"] = _efficiency(options.efficiency)
    return replace(find_gpu(options.gpu), **changes)


def _efficiency(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low <= high <= 1:
        raise SettingsError(f"--efficiency: {text} is not allowed; it must be LOW,HIGH with 0 < LOW <= HIGH <= 1")
    return low, high
