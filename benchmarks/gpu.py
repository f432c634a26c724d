"""What there is to know about a GPU: the optimizer's step, both launchers' speed and memory. One JSON and one table.

    python benchmarks/gpu.py [--json FILE] [--only optimizers|llama|resnet50]
    python benchmarks/gpu.py --device cpu --smoke      # the same code on toys: no figure of it means anything

It is meant to take less than 8 minutes on one GPU, and needs no network: the text is that of docs/, and the images are
made up. Everything is measured in processes of their own, and written as soon as it is measured: what fails, or has no
time left, costs its own figures alone. An update's time is the mean of those after the first ones,
from a wait for the device to a wait for the device.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from image_pipeline import made_photo
from training_loop import BareLoop

from stacey_dist.bench import command as bench
from stacey_dist.bench import pairs
from stacey_dist.bench.rivals import PEER
from stacey_dist.info import machine
from stacey_dist.plan.job import Job
from stacey_dist.plan.model import VOCABULARIES, planned_model
from stacey_dist.plan.plans import peak_bytes
from stacey_dist.training.launchers import IMAGES, LLM
from stacey_dist.training.processes.devices import memory_in_use
from stacey_dist.training.reports.flops import peak_flops
from stacey_dist.training.settings.image_config import ImageConfig
from stacey_dist.training.settings.llm_config import LLMConfig

ROOT = Path(__file__).parents[1]
RIVALS = (
    "torch AdamW, foreach",
    *(f"Stacey {name}, kernel" for name in ("p2, p = 2.8", "p2, p = 3", "pp, p = 2.8", "2p, p = 2.8")),
)
RUNS = 3  # of a launcher or a loop
EVERY = {"llama": 60, "resnet50": 90}
"""Updates between two checkpoints, of which a run has three. The last third before the first one is timed: a loader has
read ahead while the first updates compiled their kernels, and these batches must be gone."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="toys: to see whether it runs")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="a file for the figures (gpu.json)")
    parser.add_argument("--only", choices=("optimizers", "llama", "resnet50"), help="measure this alone")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    os.environ["ACCELERATE_USE_CPU"] = str(options.device == "cpu").lower()
    figures = measure(options.device, options.smoke, options.json, options.only or "")
    print(table(figures))
    sys.exit(1 if figures["failed"] else 0)


def measure(device: str, smoke: bool, file: Path, only: str) -> dict[str, Any]:
    """Measure everything whose name begins with `only`; write the figures so far after each part."""
    if smoke:
        bench.CASES.clear()
        bench.CASES["toy"] = lambda: [(8,)] * 2
        pairs.PRELOADED.extend(["stacey_dist.training.tasks.llm", "stacey_dist.training.tasks.images"])
    names, rounds = (RIVALS[:2], 1) if smoke else (RIVALS, 9)
    figures: dict[str, Any] = {"machine": machine(device), "smoke": smoke, "failed": {}}
    works: list[tuple[str, Callable[[], Any]]] = [
        ("optimizers", partial(bench.run, case, device, rounds, 1, names)) for case in bench.CASES
    ]
    for _ in range(1 if smoke else RUNS):
        works.append(("llama launcher", partial(pairs.in_a_process, llama_launcher, device, smoke)))
        works.append(("llama bare", partial(pairs.in_a_process, llama_bare, device, smoke)))
    works += [
        (f"resnet50 {name} loader", partial(pairs.in_a_process, resnet, smoke, name == "without"))
        for name in ("with", "without")
    ]
    for name, work in works:
        if name.startswith(only):
            try:
                figures.setdefault(name, []).append(work())
            except Exception as error:  # of this part alone
                figures["failed"][name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            file.write_text(json.dumps(figures, indent=1))
    return figures


def llama_config(smoke: bool) -> LLMConfig:
    """The paper's LLaMA 100M on C4, but for its text."""
    config = LLM.parse(["--config", str(ROOT / "configs/llm/llama_100m_c4_p2_paper.yaml")])
    data, model = config.data, config.model
    data.dataset = data.dataset_config = data.max_tokens = data.cache_dir = config.tokenizer.name = None
    config.tokenizer.vocab_size, data.validation_every = 400, 2
    if smoke:
        model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.num_attention_heads = 16, 24, 2, 2
        data.sequence_length = model.max_position_embeddings = 32
    return config


def vocabulary(smoke: bool) -> int:
    """Of the model: its text has fewer different tokens, which takes as long."""
    return 400 if smoke else VOCABULARIES["t5-base"]


def llama_launcher(device: str, smoke: bool) -> dict[str, Any]:
    """The launcher on the text of docs/."""
    from stacey_dist.training.tasks import llm, text_data

    def prepare_data(run: Any) -> text_data.TextData:
        data = text_data.prepare_data(run)
        data.corpora[0].train.vocab_size = vocabulary(smoke)
        return data

    parts = replace(llm.PARTS, prepare_data=prepare_data, task=timed(llm.LanguageModeling))
    config = llama_config(smoke)
    with tempfile.TemporaryDirectory() as directory:
        pages = sorted((ROOT / "docs").rglob("*.md"))[: 3 if smoke else None]
        text = Path(directory, "text.txt")
        text.write_text("\n\n".join(page.read_text() for page in pages))
        config.data.files = [str(text)]
        return train(replace(LLM, load_parts=lambda: parts), config, every("llama", smoke))


def llama_bare(device: str, smoke: bool) -> dict[str, Any]:
    """The same model and batch in a bare loop, with torch's fused AdamW. The batches lie on the device."""
    from stacey_dist.training.tasks import llm_model

    config = llama_config(smoke)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=config.train.mixed_precision)
    run: Any = SimpleNamespace(config=config, accelerator=accelerator, say=lambda text: None)
    data: Any = SimpleNamespace(vocab_size=vocabulary(smoke), end_token_id=0)
    model = llm_model.build_model(run, data).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.initial_weights.fill(model, optimizer, accelerator.device)
    loop = BareLoop(model, optimizer, config.train.max_grad_norm)
    shape = (config.train.global_batch_size, config.data.sequence_length)
    inputs, labels = (torch.randint(data.vocab_size, shape, device=device) for _ in range(2))
    clock = Clock(torch.device(device), every("llama", smoke))
    for _ in range(every("llama", smoke)):
        clock.tick()
        loop.step(inputs, labels, config.train.mixed_precision or "no")
    return clock.figures()


def resnet(smoke: bool, from_memory: bool) -> dict[str, Any]:
    """ResNet-50 on photos of 420 x 300 or so, decoded for each batch; or on one batch that lies on the device."""
    from stacey_dist.training.tasks import images

    class OneBatch(images.ImageClassification):
        kept: list[Any] | None = None

        def micro_batches(self, position: int) -> Iterator[Any]:
            self.kept = self.kept or list(super().micro_batches(position))
            return iter(self.kept)

    config: ImageConfig = IMAGES.parse(["--config", str(ROOT / "configs/imagenet/resnet50_p2.yaml")])
    config.data.dataset = config.data.cache_dir = config.train.epochs = None
    config.data.prefetch = 1
    if smoke:
        config.model.depth, config.model.width, config.data.image_size, config.data.eval_resize = 18, 4, 32, 32
        config.train.global_batch_size, config.data.workers = 4, 1
    parts = replace(images.PARTS, task=timed(OneBatch if from_memory else images.ImageClassification))
    with tempfile.TemporaryDirectory() as directory:
        photos = [made_photo(seed) for seed in range(4 if smoke else 64)]
        for i, photo in enumerate(photos * (1 if smoke else 8)):
            for split in ("train", "val") if i < 4 else ("train",):
                file = Path(directory, split, f"n{i % 4:08d}", f"{i}.JPEG")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(photo)
        config.data.path = directory
        return train(replace(IMAGES, load_parts=lambda: parts), config, every("resnet50", smoke))


class Clock:
    """Seconds of updates, and the peak of memory."""

    def __init__(self, device: torch.device, every: int) -> None:
        # The checkpoint after update `every` lies before the beginning of the one after it.
        self.device, self.first, self.last = device, 2 * every // 3 - 1, every - 1
        self.count, self.begin, self.seconds = 0, 0.0, 0.0

    def tick(self) -> None:
        """To be called as an update begins."""
        if self.count in (self.first, self.last):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.begin, self.seconds = now, (now - self.begin) / (self.last - self.first)
        self.count += 1

    def figures(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "peak_bytes": memory_in_use(self.device)}


def timed(task: type[Any]) -> Callable[..., Any]:
    """A launcher's task with a clock, and without an evaluation."""

    class Timed(task):
        clock: Clock

        def loss(self, model: Any, batch: Any) -> torch.Tensor:
            self.clock.tick()
            return super().loss(model, batch)

        def evaluate(self, model: Any, stopping: Any) -> dict[str, float]:
            return {"eval_loss": 0.0, "eval_top1": 0.0}

    return Timed


def every(model: str, smoke: bool) -> int:
    return 3 if smoke else EVERY[model]


def train(launcher: Any, config: Any, every: int) -> dict[str, Any]:
    """Train with three checkpoints: the second has its memory, and here does not wait until the first is written."""
    from stacey_dist.training import loop, saving

    stalls: list[float] = []
    save = saving.Saver.save

    def timed_save(self: Any, *arguments: Any, **options: Any) -> Path:
        self._background.wait()
        if self.run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        path = save(self, *arguments, **options)
        stalls.append(time.perf_counter() - begin)
        return path

    saving.Saver.save = timed_save  # type: ignore[method-assign]
    config.checkpoint.every_steps, config.train.max_steps = every, 3 * every
    config.train.eval_every_steps, config.schedule.warmup_steps = config.train.max_steps, 1
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        config.run_dir = directory
        job = launcher.build(config)
        task: Any = job.task
        task.clock = Clock(job.run.accelerator.device, every)
        loop.train(job.run, task, job.engine)
        task.close()
        found = {
            **task.clock.figures(),
            "save_stall_seconds": stalls[1],
            "units_per_second": task.units(0) / task.clock.seconds,
            "flops_per_second": task.units(0) / task.clock.seconds * task.flops_per_unit,
        }
        job.engine.close()
    return found


def table(figures: dict[str, Any]) -> str:
    """Everything in Markdown."""
    lines = [
        f"{figures['machine']}{': toys, no figure means anything' if figures['smoke'] else ''}\n",
        f"| a step of the optimizer | × {PEER} | × foreach | of copy | launches | host µs | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in figures.get("optimizers", ()):
        foreach = next(row["ratio"] for row in result["rows"] if row["optimizer"] == RIVALS[0])
        for row in result["rows"]:
            if row["optimizer"] != PEER:
                lines.append(
                    f"| {result['case']}: {row['optimizer']} | {row['ratio']:.2f} | {row['ratio'] / foreach:.2f} | "
                    f"{row['share_of_copy']:.0%} | {'–' if row['launches'] is None else row['launches']} | "
                    f"{row['host_microseconds']:.0f} | {row['extra_mebibytes']:.1f} |"
                )
    rows: dict[str, str] = {}
    if launcher := figures.get("llama launcher"):
        ours, known = statistics.median(run["seconds"] for run in launcher), peak_flops(figures["machine"])
        stall = statistics.median(run["save_stall_seconds"] for run in launcher)
        peak, run = max(run["peak_bytes"] for run in launcher), launcher[0]
        config, tokens = llama_config(figures["smoke"]), vocabulary(figures["smoke"])
        plan = peak_bytes(Job(config, planned_model(config, tokens), "single", 1, 1))
        rows |= {
            "launcher, tokens/s": f"{run['units_per_second'] * run['seconds'] / ours:,.0f}",
            "launcher, MFU": f"{run['flops_per_second'] * run['seconds'] / ours / known:.1%}" if known else "–",
            "peak memory, GiB": f"{peak / 2**30:.2f}",
            "… over what was planned (target: 10 %)": f"{peak / plan - 1:+.1%}",
            "a save stops training, ms": f"{stall * 1e3:.1f}",
        }
        if loops := figures.get("llama bare"):
            bare = statistics.median(run["seconds"] for run in loops)
            rows["launcher over a bare loop with fused AdamW (target: 2 %)"] = f"{ours / bare - 1:+.1%}"
            rows["… its peak memory, GiB"] = f"{max(run['peak_bytes'] for run in loops) / 2**30:.2f}"
    for name in ("with", "without"):
        for run in figures.get(f"resnet50 {name} loader", ()):
            rows[f"ResNet-50 {name} the loader, images/s"] = f"{run['units_per_second']:,.0f}"
    rows |= {f"{name} failed": reason.splitlines()[0] for name, reason in figures["failed"].items()}
    lines += ["", "| LLaMA 100M, 16 × 1 024 tokens; ResNet-50, 256 images of 224 pixels; bf16 | |", "|---|---|"]
    return "\n".join(itertools.chain(lines, (f"| {name} | {value} |" for name, value in rows.items())))


if __name__ == "__main__":
    main()
