"""Small launches of train_llm.py and train_imagenet.py, as a user makes them."""

import json
import math
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from stacey_dist.checkpoint import read_tensors
from stacey_dist.training.reports.norms import layer_of
from tests.training.forked import ACCELERATE, ROOT, Forked, command, environment

TINY = {
    "data": {"sequence_length": 32, "validation_every": 25},
    "tokenizer": {"vocab_size": 400},
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "train": {
        "max_steps": 24,
        "global_batch_size": 8,
        "log_every_steps": 1,
        "eval_every_steps": 12,
        "cpu_threads": 1,
    },
    "schedule": {"warmup_steps": 3},
    "checkpoint": {"every_steps": 12},
    "tracking": {"sample_tokens": 0},
}


def write_text(path, paragraphs=300):
    """Write a plain-text corpus of made-up words with some order in it."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(200)]
    with open(path, "w") as file:
        for _ in range(paragraphs):
            start = rng.randrange(200)
            file.write(" ".join(words[(start + i * i) % 200] for i in range(60)) + ".\n\n")


def write_config(directory, **changes):
    """tiny.yaml in `directory`, with its text; `changes` are sections to update."""
    text = directory / "text.txt"
    if not text.exists():
        write_text(text)
    config = {section: {**values, **changes.pop(section, {})} for section, values in TINY.items()} | changes
    config["data"]["files"] = [str(text)]
    config["data"].setdefault("cache_dir", str(directory / "cache"))
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_config_of_others(directory, **changes):
    """tiny.yaml without the numbers of a LLaMA, with little data and no warm-up: for models of other architectures."""
    changes = {"data": {"sequence_length": 16, "max_tokens": 4000}, "schedule": {"warmup_steps": 0}} | changes
    changes["train"] = {"heartbeat_timeout_seconds": None, **changes["train"]}
    path = write_config(directory, **changes)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": {}}))
    return path


TINY_IMAGES = {
    "data": {"image_size": 12, "crop": "random_resized", "min_scale": 0.5, "eval_resize": 14, "mean": [0.5] * 3},
    "model": {"depth": 18, "width": 4},
    "train": {**TINY["train"], "max_steps": 20, "eval_every_steps": 10, "global_batch_size": 16, "micro_batch_size": 4},
    "schedule": {"warmup_steps": 3},
    "checkpoint": {"every_steps": 10, "keep_best": False, "keep_last": 2},
}
CLASSES = ("n01440764", "n01443537", "n01484850")


def write_images(directory, training=50, validation=11):
    """Write an ImageNet tree of three classes, told apart by a colour, with one size and another; all JPEGs."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for split, count in (("train", training), ("val", validation + label)):
            (directory / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (rng.integers(12, 30), rng.integers(12, 30), 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(directory / split / name / f"{name}_{i}.JPEG", quality=95)


def write_image_config(directory, **changes):
    """tiny.yaml in `directory`, with its images; `changes` are sections to update."""
    if not (directory / "images").exists():
        write_images(directory / "images")
    config = {section: {**values, **changes.pop(section, {})} for section, values in TINY_IMAGES.items()} | changes
    config["data"].setdefault("path", str(directory / "images"))
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(*arguments, processes=1, expect=0, through_accelerate=False, device="cpu", **how):
    """Run a launcher to its end; returns what it printed. `how` is for `Forked` or `command`.

    The processes are forked from a server that has the imports done, which saves ten seconds a launch, in the
    environment that `accelerate launch` gives them; or it is that launcher itself, as always on a GPU.
    """
    if device == "cuda":
        how.setdefault("engine", "gpu" if processes == 1 else "ddp")
    if through_accelerate or device == "cuda":
        result = subprocess.run(
            command(*arguments, processes=processes, **how),
            env=environment(device),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )
        output, status = result.stdout, result.returncode
    else:
        engine = how.pop("engine", None if processes == 1 else "cpu_ddp")
        output, status = Forked(*arguments, processes=processes, engine=engine, **how).wait()
    launched = through_accelerate or device == "cuda"  # whose status says only that a process failed
    assert status == expect or (launched and status != 0 and expect), output[-5000:]
    return output


def launch_as_typed(directory, program, *options):
    """Run `accelerate launch PROGRAM` with nothing else said, in a directory; returns what it printed."""
    result = subprocess.run(
        [str(ACCELERATE), "launch", str(ROOT / program), *options],
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=580,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def launch_and_signal(number, step, run_dir, *arguments):
    """Start a run, send it a signal once `step` is logged; returns (output, exit status)."""
    process = Forked(*arguments, "--run_dir", run_dir)
    deadline = time.monotonic() + 300
    while process.alive() and not any(row["step"] >= step for row in rows(run_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.alive(), "the run ended before it could be interrupted"
    process.send(number)
    return process.wait()


def launch_and_signal_everyone(number, step, run_dir, *arguments, processes, **how):
    """Signal the launcher and all processes at once, as Slurm does; return what they printed."""
    with subprocess.Popen(
        command(*arguments, "--run_dir", run_dir, processes=processes, **how),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        deadline = time.monotonic() + 300
        while launcher.poll() is None and not any(row["step"] >= step for row in rows(run_dir)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert launcher.poll() is None, "the run ended before it could be interrupted"
        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            process.send_signal(number)
        output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    return output


def rows(run_dir):
    """Return the complete rows of metrics.jsonl."""
    path = Path(run_dir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def training_rows(run_dir):
    return [row for row in rows(run_dir) if "loss" in row]


def checkpoint(run_dir, step):
    """Return all tensors of a checkpoint by name."""
    return read_tensors(Path(run_dir) / "checkpoints" / f"step_{step:08d}")


# Where the sums of a batch are split differently, gradients differ in their last bits, and the bits that round z and
# m with them; a p near 2 does not magnify that, and float32 states do not round.
SMOOTH = ("--optimizer.p", "2.2", "--optimizer.lr", "0.05", "--optimizer.state_dtype", "float32")


def samples(directory, processes):
    """Return checksums of each update's samples, in the order of the processes that had them, by position.

    tests/training/instrumented.py has written them.
    """
    found = {}
    for rank in range(processes):
        for line in (directory / f"samples.{rank}").read_text().splitlines():
            position, ids = json.loads(line)
            found.setdefault(position, []).extend(ids)
    return found


def assert_nearly_equal_runs(run, reference_run, final_evaluation=True):
    ours, reference = training_rows(run), training_rows(reference_run)
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.1
    for a, b in zip(ours, reference, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)  # float32 sums of 256 tokens, over up to 24 updates
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    if not final_evaluation:
        return
    ours, reference = ([r for r in rows(d) if "eval_loss" in r] for d in (run, reference_run))
    for a, b in zip(ours, reference, strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=2e-5)


def assert_norms(run, reference, clipped):
    """Hold the last row of a run's norms.jsonl against its checkpoint, and against that of a run on one process."""
    ours, theirs = (json.loads((each / "norms.jsonl").read_text().splitlines()[-1]) for each in (run, reference))
    # The gradients are sums in another order; and z, which is rounded to half as many digits, is in a difference.
    assert ours == pytest.approx(theirs, rel=5e-3)
    gradient = math.hypot(*(value for name, value in ours.items() if name.startswith("gradient_norm/")))
    assert gradient == pytest.approx(clipped, rel=1e-4)
    saved, squares = checkpoint(run, ours["step"]), {}
    for name, tensor in saved.items():
        if name.startswith("model/"):
            name = name.removeprefix("model/")
            weight, m, z = tensor.double(), saved[f"optimizer/{name}/m"].double(), saved[f"optimizer/{name}/z"].double()
            for kind, values in (("weight_norm", weight), ("momentum_norm", m), ("z_distance", z - weight)):
                column = f"{kind}/{layer_of(name)}"
                squares[column] = squares.get(column, 0.0) + float(values.square().sum())
    # Sums of squares in float32.
    assert {name: ours[name] for name in squares} == pytest.approx({n: v**0.5 for n, v in squares.items()}, rel=1e-5)


def assert_equal_checkpoints(a, b, step):
    first, second = checkpoint(a, step), checkpoint(b, step)
    assert first.keys() == second.keys()
    assert any(name.endswith(("/z", "/exp_avg")) for name in first)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
