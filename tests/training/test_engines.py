"""train_llm.py on every engine, in the environment that `accelerate launch` gives with the users' configuration."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from stacey_dist.checkpoint import verify
from stacey_dist.errors import SettingsError
from stacey_dist.training.processes import deepspeed_config
from stacey_dist.training.settings.llm_config import LLMConfig
from tests.shared import made_once
from tests.training.helpers import (
    SMOOTH,
    assert_equal_checkpoints,
    assert_nearly_equal_runs,
    assert_norms,
    checkpoint,
    launch,
    launch_and_signal_everyone,
    training_rows,
    write_config,
)

pytestmark = pytest.mark.slow

ENGINES = {
    "cpu_zero_redundancy": "DDP and ZeroRedundancyOptimizer",
    "cpu_zero1": "DeepSpeed ZeRO-1",
    "cpu_zero2": "DeepSpeed ZeRO-2",
    "cpu_zero3": "DeepSpeed ZeRO-3",
    "cpu_fsdp2": "FSDP2",
}


FAST = (*SMOOTH, "--optimizer.lr", "0.2")  # in 12 updates the loss falls far enough for a comparison to mean something
# Every update's gradient is longer than this.
CLIPPED = ("--train.max_grad_norm", "0.3")
WATCHED = (*CLIPPED, "--tracking.histogram_every", "6", "--tracking.sample_tokens", "3")


def train_on_one(directory):
    train = {"max_steps": 12, "eval_every_steps": 6}
    config = write_config(directory, train=train, checkpoint={"every_steps": 6})
    launch("--config", config, "--run_dir", directory / "run", *FAST, *WATCHED)
    assert all(row["grad_norm"] > 0.3 for row in training_rows(directory / "run"))
    return directory, config


@pytest.fixture(scope="module")
def one_process():
    return made_once(train_on_one)


def on_engine(engine, *arguments, **options):
    return launch(*arguments, *FAST, processes=2, engine=engine, **options)


@pytest.mark.parametrize(
    "engine",
    [pytest.param(e, marks=[pytest.mark.exhaustive] * (e not in ("cpu_zero3", "cpu_fsdp2"))) for e in ENGINES],
)
def test_an_engine_trains_as_one_process_and_resumes_exactly(one_process, tmp_path, monkeypatch, engine):
    directory, config = one_process
    # Two micro-batches a process: the accumulation is the engine's own.
    whole, part = tmp_path / "whole", tmp_path / "part"
    accumulated = ("--train.micro_batch_size", 2, *WATCHED)
    arguments = (engine, "--config", config, "--run_dir", whole, *accumulated)
    if engine == "cpu_zero3":
        with monkeypatch.context() as patch:
            patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
            output = on_engine(*arguments, through_accelerate=True)
        assert not (tmp_path / "compiled").exists(), "DeepSpeed has compiled something"
    else:
        output = on_engine(*arguments)
    assert f"2 processes on cpu (1 thread) with {ENGINES[engine]}, float32, 8 sequences an update" in output
    assert "is deprecated" not in output
    assert output.count("  sample: ") == 2
    assert_nearly_equal_runs(whole, directory / "run")
    assert_norms(whole, directory / "run", clipped=0.3)
    for name, tensor in checkpoint(directory / "run", 12).items():
        ours = checkpoint(whole, 12)[name]
        assert ours.dtype == tensor.dtype
        assert ours.shape == tensor.shape
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_00000012")
    output = on_engine(engine, "--config", config, "--run_dir", part, *accumulated)
    assert "after 6 updates" in output
    assert_equal_checkpoints(part, whole, 12)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_the_first_processs_initial_weights_are_given_out(one_process, tmp_path, tied):
    """Where it is not known how weights begin, the others have none: what is in memory there is anything."""
    still = ("--config", one_process[1], "--optimizer.lr", 0, "--optimizer.tau", 0, "--schedule.warmup_steps", 0)
    still += ("--train.max_steps", 1, "--model.tie_word_embeddings", str(tied).lower())
    program = "tests/training/given_out.py"
    launch(*still, "--run_dir", tmp_path / "one", program=program)
    one = {name: tensor for name, tensor in checkpoint(tmp_path / "one", 1).items() if name.startswith("model/")}
    for engine in ("cpu_zero3", "cpu_fsdp2"):
        launch(*still, "--run_dir", tmp_path / engine, processes=2, engine=engine, program=program)
        ours = checkpoint(tmp_path / engine, 1)
        assert all(torch.equal(ours[name], tensor) for name, tensor in one.items())
        assert sum(name.startswith("model/") for name in ours) == len(one)


def test_a_run_goes_on_from_engine_to_engine(one_process, tmp_path):
    _, config = one_process
    run = tmp_path / "run"
    constant = ("--schedule.name", "constant", "--schedule.warmup_steps", 0, "--checkpoint.keep_last", 9)
    for stage, engine in enumerate(ENGINES):
        steps = 2 * (stage + 1)
        output = on_engine(engine, "--config", config, "--run_dir", run, "--train.max_steps", steps, *constant)
        assert f"after {steps - 2} updates" in output or stage == 0
    launch("--config", config, "--run_dir", run, "--train.max_steps", 12, *FAST, *constant)
    launch("--config", config, "--run_dir", tmp_path / "reference", "--train.max_steps", 12, *FAST, *constant)
    assert_nearly_equal_runs(run, tmp_path / "reference", final_evaluation=False)


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("cpu_zero2", "bf16"),
        pytest.param("cpu_zero3", "bf16", marks=pytest.mark.exhaustive),
        pytest.param("cpu_fsdp2", "bf16", marks=pytest.mark.exhaustive),
        pytest.param("cpu_fsdp2", "fp16", marks=pytest.mark.exhaustive),
        ("cpu_zero_redundancy", "fp16"),
    ],
)
def test_mixed_precision(one_process, tmp_path, engine, precision):
    directory, config = one_process
    run = tmp_path / "run"
    output = on_engine(
        engine, "--config", config, "--run_dir", run, "--train.mixed_precision", precision,
        "--model.tie_word_embeddings", "true", "--checkpoint.every_steps", 12, *CLIPPED,
    )  # fmt: skip
    assert f"mixed precision {precision}" in output
    ours, reference = training_rows(run), training_rows(directory / "run")
    assert ours[-1]["loss"] == pytest.approx(reference[-1]["loss"], abs=0.3)
    states = checkpoint(run, 12)
    if precision == "fp16":
        assert verify(run / "checkpoints" / "step_00000012")["extra"]["scaler"]["scale"] > 1
    # Master weights are what is saved.
    assert {str(t.dtype) for name, t in states.items() if name.startswith("model")} == {"torch.float32"}


@pytest.mark.parametrize("engine", [pytest.param("cpu_zero2", marks=pytest.mark.exhaustive), "cpu_zero3", "cpu_fsdp2"])
def test_an_update_with_a_loss_that_is_not_finite_changes_nothing(one_process, tmp_path, engine):
    run = tmp_path / "run"
    for last in (3, 4):  # the bad one is the third, and saved since it is the last
        on_engine(
            engine, "--config", one_process[1], "--run_dir", run, "--train.max_steps", last, "--checkpoint.every_steps",
            1, "--checkpoint.keep_last", 9, program="tests/training/ruined_update.py", RUIN="2 none", RECOVER=3,
        )  # fmt: skip
    before, bad, after = (checkpoint(run, step) for step in (2, 3, 4))
    assert all((tensor == bad[name]).all() for name, tensor in before.items())
    assert any((tensor != after[name]).any() for name, tensor in bad.items())
    assert [row["skipped_steps"] for row in training_rows(run)] == [0, 0, 1, 1]


def test_what_an_engine_cannot_do_is_said_at_the_start(one_process, tmp_path):
    _, config = one_process
    arguments = ("--config", config, "--run_dir", tmp_path / "run")
    output = on_engine("cpu_zero2", *arguments, "--model.dtype", "bfloat16", expect=2)
    assert "model.dtype: bfloat16 is not allowed with DeepSpeed" in output
    assert "File " not in output.split("train_llm.py: error:")[0]
    arguments += ("--train.mixed_precision", "bf16")
    output = on_engine("cpu_fsdp2", *arguments, "--model.dtype", "bfloat16", expect=2)
    assert "model.dtype: bfloat16 is not allowed with mixed precision bf16 on this engine" in output


@pytest.mark.exhaustive
def test_a_signal_saves_and_the_next_start_goes_on(one_process, tmp_path):
    _, config = one_process
    run = tmp_path / "run"
    arguments = ("--config", config, *FAST, *CLIPPED)
    output = launch_and_signal_everyone(signal.SIGTERM, 3, run, *arguments, processes=2, engine="cpu_zero3")
    assert output.count("stopped by signal 15 after update") == 1
    output = launch(*arguments, "--run_dir", run, processes=2, engine="cpu_fsdp2")
    assert output.count("resumed from") == 1
    assert_nearly_equal_runs(run, one_process[0] / "run")


@pytest.mark.parametrize("engine", ["cpu_ddp", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ENGINES)])
def test_forked_processes_have_the_environment_that_the_launcher_gives(tmp_path, engine):
    program = tmp_path / "program.py"
    program.write_text("import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['RANK'], 'w'))")
    for name, through_accelerate in (("launched", True), ("forked", False)):
        how = dict(engine=engine, program=program, through_accelerate=through_accelerate)
        launch(tmp_path / name, processes=2, **how)
    for rank in "01":
        launched, forked = (json.loads((tmp_path / f"{name}{rank}").read_text()) for name in ("launched", "forked"))
        others = {"MASTER_PORT", "PYTHONPATH", "PYTORCH_NVML_BASED_CUDA_CHECK"}
        different = {name for name, value in launched.items() if forked.get(name) != value} - others
        assert not {name for name in different if not name.startswith(("TORCHELASTIC_", "PYTEST_"))}


def of_deepspeed(stage=2, dtype="float32", precision="no", asked=None, **sections):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}, **sections})
    config = LLMConfig()
    config.model.dtype, config.train.mixed_precision = dtype, asked
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=precision)
    said = []
    run = SimpleNamespace(config=config, accelerator=accelerator, process_batch_size=8, micro_batch_size=4)
    run.said, run.say = said, said.append
    return run


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, r"optimizer: this section .* optimizer.\* of the run takes its place"),
        ({"scheduler": {}}, r"scheduler: this section"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping: 0.5 .* contradicts train.max_grad_norm, which gives 1.0"),
        ({"train_batch_size": 32}, r"train_batch_size: 32 .* contradicts train.global_batch_size, which gives 16"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps: 4 .* which gives 2"),
        ({"stage": 0}, r"zero_optimization.stage: 0 .* must be 1, 2 or 3"),
        ({"dtype": "bfloat16"}, r"model.dtype: bfloat16 is not allowed with DeepSpeed"),
        ({"precision": "bf16", "asked": "no"}, r"train.mixed_precision: no is contradicted by .* give bf16"),
        ({"precision": "no", "asked": "bf16"}, r"train.mixed_precision: bf16 is contradicted by .* give no"),
    ],
)
def test_a_deepspeed_configuration_that_contradicts_the_run_is_refused(sections, message):
    with pytest.raises(SettingsError, match=message):
        deepspeed_config.complete(of_deepspeed(**sections))


@pytest.mark.parametrize(
    "said", [{}, {"gradient_clipping": "auto", "train_batch_size": "auto"}, {"train_batch_size": 16}]
)
def test_a_deepspeed_configuration_is_completed(said):
    run = of_deepspeed(**said, bf16={"enabled": True})
    deepspeed_config.complete(run)
    config = run.accelerator.state.deepspeed_plugin.deepspeed_config
    assert config["gradient_clipping"] == 1.0  # DeepSpeed's default is the same; 0 must be written too
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 2)
    assert config["train_batch_size"] == 16
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["bf16"]["check_grad_overflow"] is True


@pytest.mark.parametrize(
    ("stage", "precision", "offload", "expected"),
    [
        (2, "bf16", "none", "fp32"),
        (3, "fp16", "cpu", "fp32"),
        (2, "no", "none", None),
        (1, "bf16", "none", None),
        (2, "bf16", "cpu", None),
    ],
)
def test_micro_batches_are_added_in_float32_where_deepspeed_can(stage, precision, offload, expected):
    run = of_deepspeed(stage, precision=precision)
    config = run.accelerator.state.deepspeed_plugin.deepspeed_config
    config["zero_optimization"]["offload_optimizer"] = {"device": offload}
    deepspeed_config.complete(run)
    assert config.get("data_types", {}).get("grad_accum_dtype") == expected
    told = [f"ZeRO-{stage} adds the 2 micro-batches of an update in {precision}"]
    assert [line.partition(";")[0] for line in run.said] == (told if precision != "no" and not expected else [])
