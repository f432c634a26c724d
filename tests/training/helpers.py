"""Small launches of train_llm.py, as a user makes them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ACCELERATE = Path(sys.executable).with_name("accelerate")

TINY = {
    "data": {"sequence_length": 32, "validation_every": 4},
    "tokenizer": {"vocab_size": 400},
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "train": {
        "max_steps": 40,
        "global_batch_size": 8,
        "log_every_steps": 1,
        "eval_every_steps": 20,
        "cpu_threads": 1,
    },
    "schedule": {"warmup_steps": 3},
    "checkpoint": {"every_steps": 20},
}


def write_text(path, paragraphs=300):
    """A plain-text corpus of made-up words with some order in it."""
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


def command(*arguments, processes=1):
    config = "cpu.yaml" if processes == 1 else "cpu_ddp.yaml"
    launch = [str(ACCELERATE), "launch", "--config_file", str(ROOT / "configs/accelerate" / config)]
    if processes > 1:
        launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [*launch, str(ROOT / "train_llm.py"), *map(str, arguments)]


def environment():
    """Without a GPU and without a hub, whatever the machine has."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **hidden}


def launch(*arguments, processes=1, expect=0, cwd=None):
    """Run train_llm.py to its end; returns what it printed."""
    result = subprocess.run(
        command(*arguments, processes=processes),
        env=environment(),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    failed = result.returncode != 0
    assert failed == bool(expect), result.stdout[-5000:]
    return result.stdout


def launch_and_signal(number, step, run_dir, *arguments):
    """Start a run and send its training process a signal once `step` is logged; returns (output, exit status)."""
    # Without the launcher in between, to hit the training process itself and to see its own exit status.
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_llm.py"), *map(str, arguments), "--run_dir", str(run_dir)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not any(row["step"] >= step for row in rows(run_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return output, process.returncode if number != signal.SIGKILL else None


def rows(run_dir):
    """The complete rows of metrics.jsonl."""
    path = Path(run_dir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def training_rows(run_dir):
    return [row for row in rows(run_dir) if "loss" in row]


def checkpoint(run_dir, step):
    """All tensors of a checkpoint, by file and name."""
    directory = Path(run_dir) / "checkpoints" / f"step_{step:08d}"
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
