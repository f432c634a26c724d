"""The plan's bytes are those of live tensors, on every engine: of real processes, and of ranks of 256 and 1 024."""

import functools
import itertools
import logging
from pathlib import Path

import pytest
import torch

from stacey_dist.plan import Job, Llama, checkpoint_bytes, llama
from stacey_dist.plan.engines import BUCKET, ENGINES
from stacey_dist.plan.hardware import find_gpu
from stacey_dist.plan.speed import transfers
from stacey_dist.training.command_line import parse
from stacey_dist.training.config import LLMConfig
from tests.plan_run import SHAPE, VOCABULARY, config_of, measure_all, simulate
from tests.sharding.processes import spawn
from tests.training.forked import server

pytestmark = pytest.mark.slow

DISTRIBUTED = [name for name in ENGINES if name not in ("single", "hsdp")]  # hsdp takes 4
CASES = {
    1: list(itertools.product(["single"], ["no", "bf16"], [True, False])),
    2: list(itertools.product(DISTRIBUTED, ["no", "bf16"], [True, False])),
    4: [(name, *rest) for name in [*DISTRIBUTED, "hsdp"] for rest in (("no", True), ("bf16", False))],
}


@functools.cache
def measured(processes, directory):
    return spawn(measure_all, processes, CASES[processes], directory)


def job_of(engine, precision, tied, processes):
    config = config_of(engine, precision, tied, processes, "unused")
    nodes = 2 if engine == "hsdp" else 1
    return Job(config, llama(config, VOCABULARY), engine, nodes, processes // nodes)


@pytest.mark.parametrize(
    ("processes", "engine", "precision", "tied"),
    [(processes, *case) for processes, cases in CASES.items() for case in cases],
)
def test_every_byte_that_rests_is_planned(tmp_path_factory, processes, engine, precision, tied):
    job = job_of(engine, precision, tied, processes)
    by_collective = {}
    for transfer in transfers(job, find_gpu("h100-80gb")):
        size = by_collective.get(transfer.collective, 0) + transfer.tensor_bytes
        by_collective[transfer.collective] = size
    by_collective.pop("copy", None)
    for rank, all_found in enumerate(measured(processes, str(tmp_path_factory.getbasetemp()))):
        found, held = dict(all_found[engine, precision, tied]), ENGINES[engine](job.setup, rank)
        planned = held.host or held.device
        assert found["weights"] == planned["weights"]
        assert found["gradients"] + found.get("float32 gradients", 0) == planned["gradients"]
        assert [found[name] for name in ("masters", "z", "m")] == [planned[name] for name in ("masters", "z", "m")]
        for name in ("gradient bucket", "small weights"):
            if name in found:
                assert found[name] == held.buffers[name]
        if "buckets" in found:
            assert found["buckets"] == held.buffers["gradient buckets"]
        gathered = found["collectives"].pop("all-gather", 0)
        if engine.startswith("zero3"):  # keeps what fits into MAX_LIVE from forward to backward; here, everything
            assert 0 < gathered <= by_collective.pop("all-gather")
        else:
            assert gathered == by_collective.get("all-gather", 0)
        rest = {kind: size for kind, size in by_collective.items() if kind != "all-gather"}
        assert found["collectives"] == rest
    whole, share = checkpoint_bytes(job)
    written = [found[engine, precision, tied]["checkpoint"] for found in measured(processes, str(tmp_path_factory.getbasetemp()))]
    assert sum(written) == whole


SIMULATED = [(rank, processes) for processes in (256, 1024) for rank in (0, processes - 1)]


def simulate_all(queue):
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = {}
    for engine in ("fsdp2", "hsdp", "zero1", "zero2"):
        for rank, processes in SIMULATED:
            config = config_of(engine, "bf16", False, processes, "unused")
            found[engine, rank, processes] = simulate(rank, processes, engine, config, VOCABULARY, update=True)
    config = large()
    for rank, processes in SIMULATED:
        found["70b", rank, processes] = simulate(rank, processes, "fsdp2", config, 32_000, update=False)
    queue.put(found)


def large():
    return parse(LLMConfig, ["--config", str(Path(__file__).parents[1] / "configs/llm/llama_70b.yaml")])


@functools.cache
def simulated():
    queue = server().Queue()
    process = server().Process(target=simulate_all, args=(queue,))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    return found


@pytest.mark.parametrize("engine", ["fsdp2", "hsdp", "zero1", "zero2"])
@pytest.mark.parametrize(("rank", "processes"), SIMULATED)
def test_ranks_of_many_own_what_is_planned(engine, rank, processes):
    elements, state = simulated()[engine, rank, processes]
    held = ENGINES[engine](job_of(engine, "bf16", False, processes).setup, rank)
    assert state == held.device["z"] + held.device["m"]
    padding = {"fsdp2": 0, "hsdp": 0}.get(engine, 4 * processes)
    assert elements <= state / 4 <= elements + padding


@pytest.mark.parametrize(("rank", "processes"), SIMULATED)
def test_ranks_of_many_own_what_is_planned_of_70b(rank, processes):
    config = large()
    config.train.global_batch_size = 1024
    job = Job(config, llama(config), "fsdp2", processes // 8, 8)
    elements, _ = simulated()["70b", rank, processes]
    assert 2 * elements == ENGINES["fsdp2"](job.setup, rank).device["z"]


def test_the_bucket_is_deepspeeds_default():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from stacey_dist.plan import engines

    defaults = DeepSpeedZeroConfig()
    ours = (BUCKET, engines.SUB_GROUP, engines.PERSISTENT, engines.MAX_LIVE)
    theirs = defaults.reduce_bucket_size, defaults.sub_group_size, defaults.param_persistence_threshold
    assert ours == (*theirs, defaults.max_live_parameters)


def test_the_model_is_the_launchers():
    assert Llama(VOCABULARY, *SHAPE.values(), tied=True).tail[-1].name == "model.embed_tokens.weight"
