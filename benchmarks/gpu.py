"""What there is to know about a GPU: the optimizer's step, both launchers' speed and memory. One JSON and one table.

    python benchmarks/gpu.py [--json FILE]
    python benchmarks/gpu.py --device cpu --smoke      # the same code on toys: no figure of it means anything

It is meant to take less than 8 minutes on one GPU, and needs no network: the text is that of docs/, and the images are
made up. Everything is measured in processes of their own. An update's time is the mean of those after the first ones,
from a wait for the device to a wait for the device.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from image_pipeline import made_photo
from training_loop import BareLoop

from stacey_dist import bench
from stacey_dist.plan.job import Job
from stacey_dist.plan.model import VOCABULARIES, llama
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
EVERY = 30
"""Updates between two checkpoints, of which a run has three. Those from 10 to 29 are timed."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="toys: to see whether it runs")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="a file for the figures (gpu.json)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    os.environ["ACCELERATE_USE_CPU"] = str(options.device == "cpu").lower()
    figures = measure(options.device, options.smoke)
    options.json.write_text(json.dumps(figures, indent=1))
    print(table(figures))


def measure(device: str, smoke: bool) -> dict[str, Any]:
    if smoke:
        bench.CASES.clear()
        bench.CASES["toy"] = lambda: [(8,)] * 2
        bench.PRELOADED.extend(["stacey_dist.training.tasks.llm", "stacey_dist.training.tasks.images"])
    names, rounds = (RIVALS[:2], 1) if smoke else (RIVALS, 9)
    cases = [bench.run(case, device, rounds, False, 1, names) for case in bench.CASES]
    runs = {
        name: [bench.in_a_process(function, device, smoke) for _ in range(1 if smoke else RUNS)]
        for name, function in {"launcher": llama_launcher, "bare": llama_bare}.items()
    }
    images = {name: bench.in_a_process(resnet, smoke, name == "without") for name in ("with", "without")}
    return {
        "machine": bench.machine(device),
        "smoke": smoke,
        "optimizers": cases,
        "llama": {**runs, "planned_peak_bytes": peak_bytes(Job(llama_config(smoke), planned(smoke), "single", 1, 1))},
        "resnet50": images,
    }


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


def planned(smoke: bool) -> Any:
    return llama(llama_config(smoke), vocabulary(smoke))


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
        return train(replace(LLM, load_parts=lambda: parts), config, smoke)


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
    clock = Clock(torch.device(device), every(smoke))
    for _ in range(every(smoke) + 1):
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
        return train(replace(IMAGES, load_parts=lambda: parts), config, smoke)


class Clock:
    """Seconds of updates, and the peak of memory."""

    def __init__(self, device: torch.device, every: int) -> None:
        self.device, self.first, self.last = device, every // 3, every
        self.count, self.begin, self.seconds = 0, 0.0, 0.0

    def tick(self) -> None:
        """To be called as an update begins; the one after `last` ends what is measured."""
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


def every(smoke: bool) -> int:
    return 2 if smoke else EVERY


def train(launcher: Any, config: Any, smoke: bool) -> dict[str, Any]:
    """Train with three checkpoints: the second is one that does not wait and has its memory."""
    from stacey_dist.training import loop, saving

    stalls: list[float] = []
    save = saving.Saver.save

    def timed_save(self: Any, *arguments: Any, **options: Any) -> None:
        if self.run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        save(self, *arguments, **options)
        stalls.append(time.perf_counter() - begin)

    saving.Saver.save = timed_save  # type: ignore[method-assign]
    config.checkpoint.every_steps, config.train.max_steps = every(smoke), 3 * every(smoke)
    config.train.eval_every_steps, config.schedule.warmup_steps = config.train.max_steps, 1
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        config.run_dir = directory
        job = launcher.build(config)
        task: Any = job.task
        task.clock = Clock(job.run.accelerator.device, every(smoke))
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
        f"| a step of the optimizer | × {bench.PEER} | × foreach | of copy | launches | host µs | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in figures["optimizers"]:
        foreach = next(row["ratio"] for row in result["rows"] if row["optimizer"] == RIVALS[0])
        for row in result["rows"]:
            if row["optimizer"] != bench.PEER:
                lines.append(
                    f"| {result['case']}: {row['optimizer']} | {row['ratio']:.2f} | {row['ratio'] / foreach:.2f} | "
                    f"{row['share_of_copy']:.0%} | {'–' if row['launches'] is None else row['launches']} | "
                    f"{row['host_microseconds']:.0f} | {row['extra_mebibytes']:.1f} |"
                )
    llama, images = figures["llama"], figures["resnet50"]
    ours, bare = (statistics.median(run["seconds"] for run in llama[name]) for name in ("launcher", "bare"))
    stall = statistics.median(run["save_stall_seconds"] for run in llama["launcher"])
    peak = max(run["peak_bytes"] for run in llama["launcher"])
    run, known = llama["launcher"][0], peak_flops(figures["machine"])
    rows = {
        "launcher, tokens/s": f"{run['units_per_second'] * run['seconds'] / ours:,.0f}",
        "launcher, MFU": f"{run['flops_per_second'] * run['seconds'] / ours / known:.1%}" if known else "–",
        "launcher over a bare loop with fused AdamW (target: 2 %)": f"{ours / bare - 1:+.1%}",
        "peak memory, GiB": f"{peak / 2**30:.2f}",
        "… of the bare loop": f"{max(run['peak_bytes'] for run in llama['bare']) / 2**30:.2f}",
        "… over what was planned (target: 10 %)": f"{peak / llama['planned_peak_bytes'] - 1:+.1%}",
        "a save stops training, ms": f"{stall * 1e3:.1f}",
        "ResNet-50, images/s": f"{images['with']['units_per_second']:,.0f}",
        "… without the loader": f"{images['without']['units_per_second']:,.0f}",
    }
    lines += ["", "| LLaMA 100M, 16 × 1 024 tokens; ResNet-50, 256 images of 224 pixels; bf16 | |", "|---|---|"]
    return "\n".join(itertools.chain(lines, (f"| {name} | {value} |" for name, value in rows.items())))


if __name__ == "__main__":
    main()
