"""The plan against published runs: the table in docs/how-to/plan.md has them, with their sources."""

import math
import re
from pathlib import Path

import pytest

from stacey_dist.plan import Job, make_plan, planned_model
from stacey_dist.plan.hardware import GPUS, find_gpu
from stacey_dist.plan.plans import peak_bytes
from tests.plan.test_plan import config_of

LLAMA_3_1 = ("--model.intermediate_size", "14336", "--model.num_key_value_heads", "8")
DOCUMENTATION = Path(__file__).parents[2] / "docs/how-to/plan.md"


# The plan reduces in float32, as torchtitan does, and llm-foundry elsewhere ("DEFAULT", here "PURE").
REDUCED_IN_BF16 = {("PyTorch", "7b", "a100"), ("llm-foundry", "70b", "a100")}


def rows():
    """Cells of the published runs, numbers without the spaces in them."""
    text = DOCUMENTATION.read_text().split("### Published runs")[1].split("\n## ")[0]
    found = re.findall(r"^\| (.*) \|$", text, flags=re.M)[1:]  # without the heading
    return [[re.sub(r"(?<=\d) (?=\d{3})", "", cell) for cell in row.split(" | ")] for row in found]


def job_of(model, gpus, sequence, micro, accumulation, checkpointing):
    config = config_of("7b", *LLAMA_3_1) if model == "8b" else config_of(model)
    config.optimizer.name = "adamw"
    config.data.sequence_length, config.train.micro_batch_size = int(sequence), int(micro)
    config.train.global_batch_size = gpus * int(micro) * int(accumulation)
    config.train.gradient_checkpointing = checkpointing
    return Job(config, planned_model(config, 128_256 if model == "8b" else None), "fsdp2", gpus // 8, 8)


def plans(row):
    """The GPU's name, tokens a second on a GPU, and the plans with the most and the least that is computed again."""
    _, model, gpus, *batch, checkpointing, speed, _ = row
    count, name = gpus.split()
    again = {"no": (False, False), "full": (True, True), "selective": (True, False)}[checkpointing]
    jobs = [job_of(model, int(count), *batch, each) for each in again]
    return name, float(speed), [make_plan(job, find_gpu(name)) for job in jobs]


@pytest.mark.parametrize("row", rows(), ids=lambda row: " ".join(row[:3]))
def test_a_published_run_is_as_fast_as_planned(row):
    _, speed, (slow, fast) = plans(row)
    low, high = (each.speed.tokens / seconds / each.job.ranks for each, seconds in (
        (slow, slow.speed.slow), (fast, fast.speed.fast)
    ))  # fmt: skip
    assert row[-1] == f"{low:.0f} to {high:.0f}"
    assert low < speed < high


def test_the_ranges_are_what_the_published_runs_reached():
    shares = {}
    for row in rows():
        name, speed, (slow, fast) = plans(row)
        communication = slow.speed.communication
        if (row[0].split()[0], row[1], name[:4]) in REDUCED_IN_BF16:
            scattered = sum(t.seconds for t in slow.speed.transfers if t.collective == "reduce-scatter")
            communication -= scattered / 2
        for end, plan, waited in (("slow", slow, communication), ("fast", fast, 0.0)):
            seconds = plan.speed.tokens / speed / plan.job.ranks - plan.speed.optimizer - waited
            share = plan.speed.arithmetic[0] * find_gpu(name).efficiency[1] / seconds
            shares.setdefault(GPUS[name].flops, {"slow": [], "fast": []})[end].append(share)
    for flops, found in shares.items():
        low, high = min(found["slow"]) - 0.05, max(found["fast"]) + 0.05
        expected = math.floor(low / 0.05) * 0.05, math.ceil(high / 0.05) * 0.05
        assert all(gpu.efficiency == pytest.approx(expected) for gpu in GPUS.values() if gpu.flops == flops)


def test_a_published_peak_is_between_what_is_used_and_what_is_reserved():
    peak = peak_bytes(job_of("7b", 8, 2048, 8, 1, True)) / 2**30
    assert 22.7 < peak < 31.0
    assert f"The plan says {peak:.1f}." in DOCUMENTATION.read_text()
    for model, gpus, sequence, micro, accumulation in (("13b", 64, 4096, 2, 1), ("7b", 8, 2048, 6, 2)):
        more = peak_bytes(job_of(model, gpus, sequence, micro, accumulation, False)) / 1e9
        assert f"{more:.1f} GB" in DOCUMENTATION.read_text()
        assert 80 < more < 1.2 * 80
