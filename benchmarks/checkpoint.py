"""Measure what a checkpoint costs: how long training stands still to save, and the time and memory to resume.

    accelerate launch --config_file configs/accelerate/cpu_fsdp2.yaml --num_processes 2 benchmarks/checkpoint.py

A LLaMA of 100 M parameters (--layers and --width for another) is trained and saved in turns by this package, beside
training and waiting for it, by `Accelerator.save_state`, and by `torch.save` of the whole state. This package compares
checksums and waits for the disk (fsync); the others do neither. The step that is timed "while writing" shares its
processors with the writing thread, which on a machine with a GPU it does not.
"""

import argparse
import ctypes
import gc
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from measure import median_and_minimum
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from stacey_dist import Stacey
from stacey_dist.checkpoint import BackgroundSaver, load_checkpoint, save_checkpoint
from stacey_dist.info import machine
from stacey_dist.sharding import fragments
from stacey_dist.training.processes.launch import describe_engine, start_accelerator
from stacey_dist.training.settings.llm_config import LLMConfig


class AnonymousMemory:
    """The most memory of this process (without files that are mapped) while entered, above what it had before."""

    def __enter__(self) -> "AnonymousMemory":
        self.before = self.most = self._now()
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def mebibytes(self) -> float:
        return (self.most - self.before) / 2**10

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, self._now())
            time.sleep(0.002)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def make(accelerator: Accelerator, layers: int, width: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    shape = dict(hidden_size=width, intermediate_size=1708, num_hidden_layers=layers, num_attention_heads=width // 64)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32100, use_cache=False, **shape))
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1, gradient_clipping=0.0
        )
    prepared: tuple[Any, Any] = accelerator.prepare(model, Stacey(model.parameters(), lr=1e-3))
    return prepared


def step(accelerator: Accelerator, model: Any, optimizer: Any) -> float:
    begin = time.perf_counter()
    tokens = torch.randint(32100, (1, 64), device=accelerator.device)
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    optimizer.zero_grad()
    barrier()
    return time.perf_counter() - begin


def barrier() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def timed(work: Callable[[], Any]) -> float:
    barrier()
    begin = time.perf_counter()
    work()
    barrier()
    return time.perf_counter() - begin


def torch_save(accelerator: Accelerator, model: Any, optimizer: Any, file: Path) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = get_state_dict(model, optimizer.optimizer, options=options)
    if accelerator.is_main_process:
        torch.save(states, file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    accelerator = start_accelerator(LLMConfig())
    torch.set_num_threads(max(1, (torch.get_num_threads() or 1) // accelerator.num_processes))
    found = [tempfile.mkdtemp(prefix="checkpoints-") if accelerator.is_main_process else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    directory = Path(found[0])  # type: ignore[arg-type]
    try:
        measure(accelerator, options, directory)
    finally:
        barrier()
        if accelerator.is_main_process:
            shutil.rmtree(directory, ignore_errors=True)
        accelerator.end_training()


def measure(accelerator: Accelerator, options: argparse.Namespace, directory: Path) -> None:
    model, optimizer = make(accelerator, options.layers, options.width)
    step(accelerator, model, optimizer)
    mine = sum(f.stop - f.start for f in fragments(model, optimizer) if f.replica == 0)
    parameters = int(accelerator.reduce(torch.tensor(mine, device=accelerator.device)))
    engine = describe_engine(accelerator) or " on its own"
    accelerator.print(f"{accelerator.num_processes} processes{engine}; {machine()}")
    mebibytes = 8 * parameters / 2**20
    accelerator.print(f"{parameters:,} parameters, {mebibytes:,.0f} MiB: weights in float32, z and m in bfloat16")
    save_in_turns(accelerator, model, optimizer, directory, options.rounds)
    del model, optimizer
    accelerator.print(f"\n{'resuming':26}  {'seconds, median and minimum':30}  MiB a process takes for it, at most")
    for name, load in {
        "load_checkpoint": lambda *both: load_checkpoint(directory / "ours" / "step_1", *both),
        "Accelerator.load_state": lambda *_: accelerator.load_state(str(directory / "theirs")),
    }.items():
        seconds, most = [], 0.0
        for _ in range(max(2, options.rounds // 2)):
            taken, memory = resume(accelerator, load, options)
            seconds.append(taken)
            most = max(most, memory)
        accelerator.print(f"{name:26}  {median_and_minimum(seconds, 1.0):30}  {most:8,.0f}")


def save_in_turns(accelerator: Accelerator, model: Any, optimizer: Any, directory: Path, rounds: int) -> None:
    path, whole, background = directory / "ours" / "step_1", directory / "whole.pt", BackgroundSaver()
    rivals: dict[str, Callable[[], Any]] = {
        "waiting": lambda: save_checkpoint(path, model, optimizer),
        "Accelerator.save_state": lambda: accelerator.save_state(str(directory / "theirs")),
    }
    if accelerator.state.deepspeed_plugin is None:
        rivals["torch.save of the whole"] = lambda: torch_save(accelerator, model, optimizer, whole)
    stall: dict[str, list[float]] = {"beside training": [], **{name: [] for name in rivals}}
    undisturbed, disturbed, writing = [], [], []
    for number in range(rounds + 1):
        undisturbed.append(step(accelerator, model, optimizer))
        begin = time.perf_counter()
        stall["beside training"].append(timed(lambda: background.save(path, model, optimizer)))
        disturbed.append(step(accelerator, model, optimizer))
        background.wait()
        writing.append(time.perf_counter() - begin)
        if error := background.failure():
            raise error
        for name, work in rivals.items():
            stall[name].append(timed(work))
        if number == 0:  # the first one makes the memory of the copy, and is not counted
            for figures in (undisturbed, disturbed, writing, *stall.values()):
                figures.clear()
    reference = statistics.median(stall["Accelerator.save_state"])
    accelerator.print(f"\n{'saving':26}  {'stall in s, median and minimum':30}  share of save_state's")
    for name, seconds in stall.items():
        share = statistics.median(seconds) / reference
        accelerator.print(f"{name:26}  {median_and_minimum(seconds, 1.0):30}  {share:8.3f}")
    for name, seconds in {
        "a step": undisturbed,
        "a step while writing": disturbed,
        "until it is on the disk": writing,
    }.items():
        accelerator.print(f"{name:26}  {median_and_minimum(seconds, 1.0)}")


def resume(
    accelerator: Accelerator, load: Callable[[Any, Any], Any], options: argparse.Namespace
) -> tuple[float, float]:
    """Return seconds, and the memory in MiB of the process that took most."""
    accelerator.free_memory()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed would be used again, and not be seen
    model, optimizer = make(accelerator, options.layers, options.width)
    with AnonymousMemory() as memory:
        seconds = timed(lambda: load(model, optimizer))
    everyone = accelerator.gather(torch.tensor([memory.mebibytes], device=accelerator.device))
    return seconds, float(everyone.max())


if __name__ == "__main__":
    main()
