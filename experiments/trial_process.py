"""The process of a trial: what `accelerate launch` of the launcher would do, without the export.

Imported by the server that trials are forked from, and by nobody else: it takes seconds.
"""

import multiprocessing
import os
import pkgutil
import signal
import statistics
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import accelerate.accelerator  # noqa: F401
import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch
import transformers.models.llama.modeling_llama
import transformers.models.resnet.modeling_resnet  # noqa: F401

from experiments.framework import dump, write
from experiments.trial import Result, evaluations
from stacey_dist.errors import DivergedError
from stacey_dist.sharding import state_bytes
from stacey_dist.training.launchers import LAUNCHERS
from stacey_dist.training.loop import train
from stacey_dist.training.processes.failures import user_errors
from stacey_dist.training.reports.rows import read_rows

for launcher in LAUNCHERS.values():
    launcher.load_parts()


def train_and_report(program: str, arguments: list[str], directory: Path, watch: str) -> None:
    """Train as the launcher does, and write result.json."""
    sys.argv = [program]
    threading.Thread(target=_end_with_the_experiment, daemon=True).start()
    with user_errors(program):
        write(directory / "result.json", dump(asdict(_train(program, arguments, watch))))


def _end_with_the_experiment() -> None:
    """Save and end once the process that asked for the run is gone, however it went: its successor resumes."""
    experiment = multiprocessing.parent_process()
    if experiment is not None:
        experiment.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _train(program: str, arguments: list[str], watch: str) -> Result:
    launcher = LAUNCHERS[program]
    built = launcher.build(launcher.parse(arguments))
    run, task, engine = built.run, built.task, built.engine
    diverged = False
    try:
        train(run, task, engine, callbacks=[pkgutil.resolve_name(watch)()] if watch else [])
    except DivergedError as error:
        run.say(str(error))
        diverged = True
    rows = [row for row in read_rows(run.directory / "metrics.jsonl") if "loss" in row]
    speed = statistics.median(row[f"{task.unit}_per_second"] for row in rows)
    return Result(
        evaluations=evaluations(run.directory),
        diverged=diverged,
        seconds_per_update=task.units(0) / max(speed, 0.05),  # rows are rounded to tenths
        state_bytes_per_parameter=state_bytes(engine.optimizer) / sum(p.numel() for p in engine.module.parameters()),
        threads=torch.get_num_threads(),
    )
