"""train_imagenet.py: exact evaluation, every engine, precisions, the best checkpoint, signals, what it exports."""

import io
import json
import shutil
import signal
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from stacey_dist.data.images.augment import Transform
from stacey_dist.models import CifarResNet
from stacey_dist.models.export import export_model
from stacey_dist.training.settings.image_config import ImageDataConfig
from stacey_dist.training.tasks.images import _save_processor
from tests.ended import still_running
from tests.shared import made_once
from tests.training.forked import Forked
from tests.training.helpers import (
    CLASSES,
    SMOOTH,
    assert_equal_checkpoints,
    checkpoint,
    launch,
    launch_as_typed,
    rows,
    training_rows,
    write_image_config,
    write_images,
)

pytestmark = pytest.mark.slow
PROGRAM = "train_imagenet.py"
HELD_OUT = 11 + 12 + 13  # write_images' validation images, by class; no number of processes from 5 on divides it


@pytest.fixture(scope="module")
def config():
    return made_once(write_image_config)


def evaluations(run):
    return [row for row in rows(run) if "eval_top1" in row]


def run_on(directory, config, engine, processes, *arguments):
    """Make 20 updates on an engine; return the run directory and what was printed."""
    output = launch(
        "--config", config, "--run_dir", directory / "run", *SMOOTH, "--checkpoint.every_steps", 5,
        "--checkpoint.keep_last", 9, *arguments, program=PROGRAM, processes=processes,
        engine=None if processes == 1 else engine,
    )  # fmt: skip
    return directory / "run", output


@pytest.fixture(scope="module")
def on(config):
    return lambda engine, processes, *arguments: made_once(run_on, config, engine, processes, *arguments)


@pytest.mark.parametrize(
    "engine",
    [
        "cpu_fsdp2",
        *(
            pytest.param(engine, marks=pytest.mark.exhaustive)
            for engine in ("cpu_ddp", "cpu_zero_redundancy", "cpu_zero1", "cpu_zero2", "cpu_zero3")
        ),
    ],
)
def test_an_engine_trains_as_one_process(on, engine):
    run, output = on(engine, 2)
    alone, _ = on("cpu", 1)
    assert "16 images an update" in output
    # The same micro-batches, so the same batch statistics, and float32 sums in another order. Batch norms of a few
    # pixels magnify that a thousandfold in seven updates; one process with two threads strays from itself as far.
    ours, reference = training_rows(run)[:4], training_rows(alone)[:4]
    for a, b in zip(ours, reference, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["epoch"] == b["epoch"]
    mine, theirs, ddp = (checkpoint(directory, 5) for directory in (run, alone, on("cpu_ddp", 2)[0]))
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    # The statistics are of the first process's share: two of each update's four micro-batches.
    statistics = [name for name in mine if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 2 * 20
    for name in statistics:
        assert mine[name].dtype == torch.float32
        assert not torch.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine[name], ddp[name], rtol=1e-3, atol=1e-4)
    assert {int(value) for name, value in mine.items() if name.endswith("num_batches_tracked")} == {2 * 5}


@pytest.mark.parametrize("engine", [pytest.param("cpu_zero3", marks=pytest.mark.exhaustive), "cpu_fsdp2"])
def test_a_resumed_run_has_the_same_weights_and_statistics(config, on, tmp_path, engine):
    whole, _ = on(engine, 2)
    shutil.copytree(whole / "checkpoints" / "step_00000010", tmp_path / "checkpoints" / "step_00000010")
    output = launch(
        "--config", config, "--run_dir", tmp_path, *SMOOTH, "--data.workers", 2, program=PROGRAM, processes=2,
        engine=engine,
    )  # fmt: skip
    assert "after 10 updates" in output
    assert_equal_checkpoints(tmp_path, whole, 20)
    assert evaluations(tmp_path)[-1] == evaluations(whole)[-1]


def evaluate_by_hand(model, directory):
    """Return (loss, top-1, top-5) over the validation images, through Pillow, one at a time."""
    figures = []
    for label, name in enumerate(CLASSES):
        for path in sorted((directory / "images" / "val" / name).iterdir()):
            image = Image.open(path).convert("RGB")
            width, height = image.size
            size = (14, int(14 * height / width)) if width < height else (int(14 * width / height), 14)
            image = image.resize(size, Image.Resampling.BILINEAR)
            width, height = image.size
            left, top = round((width - 12) / 2), round((height - 12) / 2)
            pixels = torch.tensor(np.array(image.crop((left, top, left + 12, top + 12))), dtype=torch.float64)
            x = ((pixels / 255 - 0.5) / 0.3081).permute(2, 0, 1)[None]
            logits = model(pixel_values=x).logits[0]
            order = logits.argsort(descending=True).tolist()
            figures.append([-logits.log_softmax(-1)[label].item(), order[0] == label, label in order[:5]])
    assert len(figures) == HELD_OUT
    return np.mean(figures, axis=0)


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        *(pytest.param(processes, (), marks=pytest.mark.exhaustive) for processes in (1, 2)),
        (4, ("--train.micro_batch_size", "2")),
    ],
)
def test_each_held_out_image_counts_once(config, on, tmp_path, processes, arguments):
    run, _ = on("cpu_ddp", processes, *arguments)
    export_model(run / "checkpoints" / "step_00000020", tmp_path)
    with torch.no_grad():
        model = CifarResNet.from_pretrained(tmp_path).double().eval()
        loss, top1, top5 = evaluate_by_hand(model, config.parent)
    reported = evaluations(run)[-1]
    # Pillow's and torch's resizing differ by a grey level here and there.
    assert reported["eval_loss"] == pytest.approx(loss, rel=0.01)
    assert abs(reported["eval_top1"] - top1) * HELD_OUT < 1.5
    assert reported["eval_top1"] * HELD_OUT == pytest.approx(round(reported["eval_top1"] * HELD_OUT))
    assert reported["eval_top5"] == top5 == 1.0  # three classes


@pytest.mark.parametrize(
    ("engine", "processes", "precision"),
    [
        ("cpu", 1, "bf16"),
        pytest.param("cpu", 1, "fp16", marks=pytest.mark.exhaustive),
        pytest.param("cpu_zero3", 2, "bf16", marks=pytest.mark.exhaustive),
        pytest.param("cpu_fsdp2", 2, "bf16", marks=pytest.mark.exhaustive),
    ],
)
def test_mixed_precision(on, engine, processes, precision):
    run, output = on(engine, processes, "--train.mixed_precision", precision)
    assert f"mixed precision {precision}" in output
    losses = [row["loss"] for row in training_rows(run)]
    full = [row["loss"] for row in training_rows(on("cpu", 1)[0])]
    assert losses[-1] < losses[0] - 0.1
    assert losses != full
    np.testing.assert_allclose(losses[:5], full[:5], atol=0.1)
    saved = checkpoint(run, 20)
    assert {t.dtype for n, t in saved.items() if n.startswith("model/") and not n.endswith("tracked")} == {
        torch.float32
    }
    means = [t for n, t in saved.items() if n.endswith("running_mean")]
    assert not all(torch.equal(t, t.bfloat16().float()) for t in means), "the statistics were rounded to bfloat16"


def test_the_best_and_the_last_checkpoint_stay(config, tmp_path):
    # A learning rate that first learns and then destroys: the best evaluation is not the last.
    run = tmp_path / "run"
    launch(
        "--config", config, "--run_dir", run, "--train.eval_every_steps", 2, "--checkpoint.every_steps", 5,
        "--checkpoint.keep_best", "true", "--checkpoint.keep_last", 1, "--optimizer.lr", "0.3",
        "--schedule.name", "constant", "--schedule.warmup_steps", 20, program=PROGRAM,
    )  # fmt: skip
    figures = {row["step"]: row["eval_top1"] for row in evaluations(run)}
    best = max(figures, key=lambda step: (figures[step], -step))
    assert best < 20, figures
    assert {p.name for p in (run / "checkpoints").iterdir()} == {f"step_{best:08d}", "step_00000020"}


def test_workers_survive_the_signal_that_everyone_gets(config, tmp_path):
    # As Slurm and a terminal do it: the training process and its workers all get the signal.
    run = tmp_path / "run"
    group = Forked(
        "--config", config, "--run_dir", run, "--train.max_steps", 4000, "--data.workers", 2, program=PROGRAM
    )
    while group.alive() and not training_rows(run):
        time.sleep(0.01)
    everyone = psutil.Process(group.processes[0].pid).children(recursive=True)
    workers = [process for process in everyone if process.is_running()]
    assert len(workers) >= 2
    for process in workers:
        process.send_signal(signal.SIGTERM)
    group.send(signal.SIGTERM)
    output, status = group.wait()
    assert status == 128 + signal.SIGTERM, output
    assert "SIGTERM: finishing this step, then saving" in output
    assert "Traceback" not in output
    assert "the same command resumes from here" in output
    assert not still_running(workers, 15)


def hang_up_the_workers(group):
    """Stop a run's workers in the middle, as a disk that does not answer does; returns them."""
    workers = psutil.Process(group.processes[0].pid).children(recursive=True)
    assert len(workers) == 2
    for process in workers:
        process.suspend()
    return workers


@pytest.mark.parametrize("evaluating", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_sigterm_saves_and_ends_a_run_that_waits_for_data(config, on, tmp_path, evaluating):
    run = tmp_path / "run"
    often = ("--train.eval_every_steps", 1) if evaluating else ()
    arguments = ("--config", config, "--run_dir", run, *SMOOTH, *often)
    group = Forked(*arguments, "--data.workers", 2, "--data.prefetch", 1, program=PROGRAM)
    while group.alive() and not training_rows(run):
        time.sleep(0.01)
    workers = hang_up_the_workers(group) if not evaluating else hang_up_the_evaluation(group)
    time.sleep(2)  # what was prepared is used up, and it waits
    group.send(signal.SIGTERM)
    begun = time.monotonic()
    output, status = group.wait()
    assert time.monotonic() - begun < 30
    assert status == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    assert "the same command resumes from here" in output
    assert not still_running(workers, 5)
    if not evaluating:
        # What a part of an update has done to the statistics of batch norms is not in the checkpoint.
        launch(*arguments, program=PROGRAM)
        assert_equal_checkpoints(run, on("cpu", 1)[0], 20)


def hang_up_the_evaluation(group):
    """Stop the two workers of an evaluation, beside the two of training."""
    while True:
        children = psutil.Process(group.processes[0].pid).children(recursive=True)
        assert group.alive()
        if len(children) == 4:
            for process in children:
                process.suspend()
            return children


def test_workers_that_die_or_hang_end_the_run_with_one_line(config, tmp_path):
    for number, message in (
        (signal.SIGKILL, "error: data.workers: worker process {} was killed by SIGKILL"),
        (signal.SIGSTOP, "error: data.timeout_seconds: no batch came from the worker processes within 3 s"),
    ):
        run = tmp_path / number.name
        group = Forked(
            "--config", config, "--run_dir", run, "--train.max_steps", 4000, "--data.workers", 2,
            "--data.timeout_seconds", 3, program=PROGRAM,
        )  # fmt: skip
        while group.alive() and not training_rows(run):
            time.sleep(0.01)
        worker = psutil.Process(group.processes[0].pid).children(recursive=True)[0]
        worker.send_signal(number)
        output, status = group.wait(60)
        assert status == 2, output
        assert "Traceback" not in output
        assert message.format(worker.pid) in output
        assert not still_running([worker], 5)


def test_broken_images_are_named_once_and_counted_out(config, tmp_path):
    shutil.copytree(config.parent / "images", tmp_path / "images")
    broken = [tmp_path / "images" / split / CLASSES[0] / f"{CLASSES[0]}_3.JPEG" for split in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    output = launch(
        "--config", config, "--data.path", tmp_path / "images", "--run_dir", tmp_path / "run",
        "--train.epochs", 1.5, program=PROGRAM,
    )  # fmt: skip
    assert output.count("left out a broken image") == 2
    assert all(output.count(str(path)) == 1 for path in broken)
    assert "1 broken image of the training data" in output
    top1 = evaluations(tmp_path / "run")[-1]["eval_top1"] * (HELD_OUT - 1)
    assert top1 == pytest.approx(round(top1))
    # 150 images, one and a half times, by 16.
    assert training_rows(tmp_path / "run")[-1]["step"] == 15
    assert "--train.epochs 3" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "/nowhere"], "data.path: /nowhere"),
        (["--model.sync_batch_norm", "true"], "model.sync_batch_norm: True is not allowed; torch synchronizes"),
        (["--train.gradient_checkpointing", "true"], "train.gradient_checkpointing: True is not allowed"),
        (["--data.eval_resize", "5"], "data.eval_resize: 5 is not allowed; it must be at least data.image_size = 12"),
        (["--data.timeout_seconds", "0"], "data.timeout_seconds: 0.0 is not allowed"),
        (
            ["--train.micro_batch_size", "1", "--model.stem", "imagenet"],
            "train.micro_batch_size: 1 is not allowed with data.image_size 12 and model.stem imagenet: the images",
        ),
        (
            ["--data.workers", "2", "--data.prefetch", "1000000000"],
            "data.prefetch: 1000000000 batches of 0.0 MB for each of 2 worker processes are more than there is memory",
        ),
        (["--data.std", "1,0,1"], "data.std: [1.0, 0.0, 1.0] is not allowed"),
        (["--train.epochs", "0.01"], "schedule.warmup_steps: 3 is not allowed; it must be at most train.max_steps = 1"),
        (["--optimizer.name", "adagrad"], "it must be one of stacey"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(config, tmp_path, arguments, message):
    output = launch("--config", config, "--run_dir", tmp_path / "run", *arguments, program=PROGRAM, expect=2)
    assert message in output
    assert "Traceback" not in output


def test_other_images_are_another_run(config, on, tmp_path):
    run = shutil.copytree(on("cpu", 1)[0], tmp_path / "run")
    changed = write_image_config(tmp_path, train={"max_steps": 30})
    write_images(tmp_path / "fewer", training=49)
    output = launch(
        "--config",
        changed,
        "--data.path",
        tmp_path / "fewer",
        "--run_dir",
        run,
        *SMOOTH,
        program=PROGRAM,
        expect=2,
    )
    assert "data: the training or held-out data are not those it was trained on" in output
    output = launch("--config", changed, "--data.crop", "none", "--run_dir", run, *SMOOTH, program=PROGRAM, expect=2)
    assert "data.crop: random_resized in the checkpoint, none now" in output
    # The same images elsewhere.
    output = launch("--config", changed, "--run_dir", run, *SMOOTH, program=PROGRAM)
    assert "after 20 updates" in output


def test_imagenet_form_is_exported_for_transformers(tmp_path):
    # The hub's parquet, a ResNet with ImageNet's stem, and transformers' own loading and preprocessing.
    rng = np.random.default_rng(0)
    directory = tmp_path / "data"
    directory.mkdir()
    images = [rng.integers(0, 255, (40, 52, 3), dtype=np.uint8) for _ in range(12)]
    for split, chosen in (("train", images), ("validation", images[:7])):
        encoded = []
        for pixels in chosen:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": encoded, "label": pa.array([i % 3 for i in range(len(chosen))], pa.int64())})
        names = {"image": {"_type": "Image"}, "label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": names}})})
        pa.parquet.write_table(table, directory / f"{split}-00000-of-00001.parquet")
    config = write_image_config(
        tmp_path,
        data={"path": str(directory), "image_size": 32, "eval_resize": 36, "std": [0.25] * 3},
        model={"depth": 50, "stem": "imagenet", "width": 4, "zero_init_residual": True},
        train={"max_steps": 3, "label_smoothing": 0.1},
    )
    output = launch("--config", config, "--run_dir", tmp_path / "run", program=PROGRAM)
    exported = tmp_path / "run" / "model"
    assert f"model for transformers: {exported}" in output
    model = AutoModelForImageClassification.from_pretrained(exported).eval()
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    processor = AutoImageProcessor.from_pretrained(exported)
    with torch.no_grad():
        inputs = processor([Image.fromarray(pixels) for pixels in images[:7]], return_tensors="pt")
        assert inputs["pixel_values"].shape == (7, 3, 32, 32)
        logits = model(**inputs).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([i % 3 for i in range(7)])).item()
    assert evaluations(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(loss, rel=0.02)  # Pillow's resizing


@pytest.mark.parametrize(("size", "resize"), [(32, None), (32, 36), (384, None), (400, 457)])
def test_the_exported_processor_does_what_evaluation_does(tmp_path, size, resize):
    settings = ImageDataConfig(image_size=size, eval_resize=resize, crop="none", mean=(0.5,) * 3, std=(0.25,) * 3)
    _save_processor(settings, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    transform = Transform(size, "none", settings.flip, settings.min_scale, resize)
    rng = np.random.default_rng(0)
    for height, width in ((300, 400), (500, 333), (20, 30)):
        coarse = rng.integers(0, 256, (6, 5, 3), np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        ours = (transform.evaluation(pixels).transpose(2, 0, 1) / 255 - 0.5) / 0.25
        theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
        assert theirs.shape == (3, size, size)
        assert np.abs(theirs - ours).mean() < 0.03  # two ways to resize, of a range of 4


def test_quickstart(tmp_path):
    """`accelerate launch train_imagenet.py` in an empty directory."""
    output = launch_as_typed(tmp_path, PROGRAM, "--train.max_steps", "40")
    run = tmp_path / "runs" / "digits"
    assert evaluations(run)[-1]["eval_top1"] > 0.45  # guessing: .10; measured: .581
    assert all(0 <= row["data_wait"] <= 1 for row in training_rows(run))
    assert "  data " in output
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "model/model.safetensors", "model/config.json"):
        assert (run / name).is_file(), name
