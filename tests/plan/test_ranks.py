"""The plan's bytes are those of live tensors, on every engine: of real processes, and of ranks of 256 and 1 024."""

import functools
import logging
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from stacey_dist.plan import Job, checkpoint_bytes, planned_model
from stacey_dist.plan.hardware import find_gpu
from stacey_dist.plan.memory import BUCKET, ENGINES
from stacey_dist.plan.speed import transfers
from stacey_dist.training.settings.command_line import parse
from stacey_dist.training.settings.llm_config import LLMConfig
from tests.plan.live import VOCABULARY, config_of, measure_all, simulate
from tests.sharding.processes import spawn
from tests.shared import made_once
from tests.training.forked import server

pytestmark = pytest.mark.slow

QUICK = (1, 3)  # numbers of processes that are measured in CI; all are with -m exhaustive
DISTRIBUTED = [name for name in ENGINES if name not in ("single", "hsdp")]  # hsdp takes 4
CASES = {  # (engine, precision, tied): the others are in between
    1: [("single", precision, tied) for precision in ("no", "bf16") for tied in (True, False)],
    2: [(engine, *rest) for engine in DISTRIBUTED for rest in (("no", True), ("bf16", False))],
    3: [("fsdp2", "bf16", False), ("zero3", "no", True), ("zero2", "bf16", True), ("ddp", "no", True)],
    4: [(engine, "bf16", True) for engine in [*DISTRIBUTED, "hsdp"]]
    + [(engine, "no", False) for engine in ("zero2", "fsdp2", "hsdp")],
}

NUMBERS_ON_THEIR_WAY = 12 * 8 * 1024
"""Bytes: of `stacey_dist.training.counter_random`, for 1 024 elements at a time."""


def measure(directory, processes):
    if processes > 1:
        return spawn(measure_all, processes, CASES[processes], str(directory))
    found = alone(measure_all, 0, CASES[processes], str(directory)).get()
    assert isinstance(found, list), found
    return found


def single(tied):
    """The initial weights that one process makes."""
    (found,) = made_once(measure, 1)
    return {name: values for name, (_, values) in found["single", "no", tied]["initial weights"].items()}


def job_of(engine, precision, tied, processes):
    config = config_of(engine, precision, tied, processes, "unused")
    nodes = 2 if engine == "hsdp" else 1
    return Job(config, planned_model(config, VOCABULARY), engine, nodes, processes // nodes)


@pytest.mark.parametrize(
    ("processes", "engine", "precision", "tied"),
    [
        pytest.param(processes, *case, marks=[pytest.mark.exhaustive] * (processes not in QUICK))
        for processes, cases in CASES.items()
        for case in cases
    ],
)
def test_every_byte_that_rests_is_planned(processes, engine, precision, tied):
    job = job_of(engine, precision, tied, processes)
    by_collective = {}
    for transfer in transfers(job, find_gpu("h100-80gb")):
        size = by_collective.get(transfer.collective, 0) + transfer.tensor_bytes
        by_collective[transfer.collective] = size
    by_collective.pop("copy", None)
    for rank, all_found in enumerate(made_once(measure, processes)):
        found, kept = dict(all_found[engine, precision, tied]), ENGINES[engine](job, rank)
        planned = kept.host or kept.device
        assert found["weights"] == planned["weights"]
        if engine == "zero3":  # it would put a whole model on every device
            assert found["before the engine"] == planned["weights"]
        largest = 4 * max(parameter.elements for parameter in job.model.parameters)
        if engine in ("fsdp2", "hsdp"):  # no process has more than its share and a layer while the model is built
            assert found["most"] <= planned["weights"] + largest + NUMBERS_ON_THEIR_WAY
        if engine.startswith("zero3"):  # then DeepSpeed makes the masters and its bucket
            assert found["most before the engine"] <= planned["weights"] + largest + NUMBERS_ON_THEIR_WAY
        assert found["gradients"] + found.get("float32 gradients", 0) == planned["gradients"]
        assert [found[name] for name in ("masters", "z", "m")] == [planned[name] for name in ("masters", "z", "m")]
        for name in ("gradient bucket", "small weights"):
            if name in found:
                assert found[name] == kept.buffers[name]
        if "buckets" in found:
            assert found["buckets"] == kept.buffers["gradient buckets"]
        gathered = found["collectives"].pop("all-gather", 0)
        if engine.startswith("zero3"):  # keeps what fits into MAX_LIVE from forward to backward; here, everything
            assert 0 < gathered <= by_collective["all-gather"]
        else:
            assert gathered == by_collective.get("all-gather", 0)
        rest = {kind: size for kind, size in by_collective.items() if kind != "all-gather"}
        assert found["collectives"] == rest
    whole, _ = checkpoint_bytes(job)
    written = [found[engine, precision, tied]["checkpoint"] for found in made_once(measure, processes)]
    assert sum(written) == whole


@pytest.mark.parametrize(
    "processes", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n not in QUICK)) for n in CASES]
)
def test_initial_weights_are_the_same_bits_on_every_engine_and_number_of_processes(processes):
    for engine, precision, tied in CASES[processes]:
        whole = single(tied)
        made = {name: np.zeros(values.shape, bool) for name, values in whole.items()}
        for found in made_once(measure, processes):
            for name, (start, values) in found[engine, precision, tied]["initial weights"].items():
                stop = start + values.size
                assert np.array_equal(values.view(np.int32), whole[name][start:stop].view(np.int32)), (engine, name)
                made[name][start:stop] = True
        assert all(elements.all() for elements in made.values())


SIMULATED = [(rank, processes) for processes in (256, 1024) for rank in (0, processes - 1)]
ENGINES_OF_MANY = {256: ("fsdp2",), 1024: ("fsdp2", "hsdp", "zero2")}


def large():
    config = parse(LLMConfig, ["--config", str(Path(__file__).parents[2] / "configs/llm/llama_70b.yaml")])
    config.train.global_batch_size = 1024
    return config


def alone(function, *arguments):
    """Start a function in a process of its own, without a process group; its result can be waited for."""
    results = server().SimpleQueue()
    process = server().Process(target=_alone, args=(results, function, arguments), daemon=True)
    process.start()
    return results


def _alone(results, function, arguments):
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        results.put(function(*arguments))
    except BaseException:
        results.put(traceback.format_exc())
        raise


@functools.cache
def simulated(processes):
    """Return what the first and the last rank own, by rank."""
    small = [(engine, config_of(engine, "bf16", False, processes, "unused")) for engine in ENGINES_OF_MANY[processes]]
    cases = [*((*case, VOCABULARY, True) for case in small), ("fsdp2", large(), 32_000, False)]
    started = {rank: alone(simulate, rank, processes, cases) for rank, of in SIMULATED if of == processes}
    return {rank: results.get() for rank, results in started.items()}


@pytest.mark.parametrize(
    ("rank", "processes"),
    [pytest.param(*key, marks=[pytest.mark.exhaustive] * (key[1] != 256)) for key in SIMULATED],
)
def test_ranks_of_many_own_what_is_planned(rank, processes):
    found = simulated(processes)[rank]
    assert isinstance(found, list), found
    *small, (count_70b, _) = found
    for engine, (count, state) in zip(ENGINES_OF_MANY[processes], small, strict=True):
        kept = ENGINES[engine](job_of(engine, "bf16", False, processes), rank)
        assert state == kept.device["z"] + kept.device["m"]
        padding = 2 * 2 * processes if engine == "zero2" else 0  # of each group, to 2 elements a rank
        assert count <= state // 4 <= count + padding
    config = large()
    job = Job(config, planned_model(config), "fsdp2", processes // 8, 8)
    assert 2 * count_70b == ENGINES["fsdp2"](job, rank).device["z"]


def test_the_bucket_is_deepspeeds_default():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from stacey_dist.plan import memory

    defaults = DeepSpeedZeroConfig()
    ours = (BUCKET, memory.SUB_GROUP, memory.PERSISTENT, memory.MAX_LIVE)
    theirs = defaults.reduce_bucket_size, defaults.sub_group_size, defaults.param_persistence_threshold
    assert ours == (*theirs, defaults.max_live_parameters)
