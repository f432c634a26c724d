"""The files under configs/: each runs as it is, and those that say the same thing twice agree."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from stacey_dist.sharding import base_optimizer, fragments
from stacey_dist.training.settings.llm_config import LLMConfig
from tests.sharding.processes import outcome, spawn
from tests.training.helpers import launch, training_rows, write_config

CONFIGS = Path(__file__).parents[1] / "configs"
DEEPSPEED = sorted(path.stem for path in (CONFIGS / "deepspeed").iterdir())
TWINS = ["ddp", "zero_redundancy", "zero1", "zero2", "zero3", "fsdp2"]


def accelerate_config(name):
    return yaml.safe_load((CONFIGS / "accelerate" / f"{name}.yaml").read_text())


def test_the_promised_files_are_there():
    names = {path.stem for path in (CONFIGS / "accelerate").iterdir()}
    assert names == {*TWINS, *(f"cpu_{name}" for name in TWINS), "cpu", "gpu", "zero3_offload", "hsdp"}
    assert DEEPSPEED == ["zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGS.glob("llm/*"), *CONFIGS.glob("imagenet/*")]),
    ids=lambda path: f"{path.parent.stem}-{path.stem}",
)
def test_configurations_say_what_is_scheduled(path):
    """A change of the defaults is not to change them: a run that is resumed would go on otherwise."""
    schedule = yaml.safe_load(path.read_text())["schedule"]
    follows = f"{path.parent.stem}/{path.stem}" in ("imagenet/quickstart", "llm/long_run")
    assert (schedule["alpha"], schedule["tau"]) == ("constant", "lr" if follows else "constant")


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").iterdir()), ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    load_config_from_file(str(path))


@pytest.mark.parametrize("name", TWINS)
def test_cpu_and_gpu_configurations_differ_in_the_machine_alone(name):
    gpu, cpu = accelerate_config(name), accelerate_config(f"cpu_{name}")
    assert (gpu.pop("num_processes"), cpu.pop("num_processes")) == (8, 2)
    assert (gpu.pop("mixed_precision"), cpu.pop("mixed_precision")) == ("bf16", "no")
    assert gpu == cpu


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_and_accelerate_configurations_agree(name):
    json_config = json.loads((CONFIGS / "deepspeed" / f"{name}.json").read_text())
    ours = accelerate_config(name)
    zero, section = json_config["zero_optimization"], ours["deepspeed_config"]
    assert zero["stage"] == section["zero_stage"]
    for kind in ("offload_optimizer", "offload_param"):
        assert zero.get(kind, {}).get("device") == section.get(f"{kind}_device")
    assert zero.get("stage3_gather_16bit_weights_on_model_save") == section.get("zero3_save_16bit_model")
    assert json_config["bf16"]["enabled"] == (ours["mixed_precision"] == "bf16")
    # Optimizer, schedule and clipping are the launcher's defaults.
    defaults = LLMConfig()
    params = json_config["optimizer"]["params"]
    settings = asdict(defaults.optimizer)
    assert {key: settings[key] for key in params} == params | {"betas": tuple(params["betas"])}
    assert json_config["gradient_clipping"] == defaults.train.max_grad_norm
    assert json_config["scheduler"]["params"] == {
        "total_num_steps": defaults.train.max_steps,
        "warmup_num_steps": defaults.schedule.warmup_updates(defaults.train.max_steps),
        "cos_min_ratio": defaults.schedule.min_lr_ratio,
    }


def bare_program(name):
    """Train as a user of DeepSpeed does."""
    import deepspeed

    import stacey_dist

    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=str(CONFIGS / "deepspeed" / f"{name}.json")
    )
    torch.manual_seed(torch.distributed.get_rank())
    inputs = torch.randn(8, 7, dtype=torch.bfloat16)
    losses = []
    for _ in range(30):
        loss = (engine(inputs) - inputs[:, :5]).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert type(base_optimizer(optimizer)) is stacey_dist.Stacey
    parts = fragments(engine, optimizer)
    assert {t.dtype for f in parts for t in (f.z, f.m)} == {torch.bfloat16}
    assert {f.weight.dtype for f in parts} == {torch.float32}
    # The first two updates of DeepSpeed's warm-up have a learning rate of 0, and are not counted.
    assert all(f.step == 28 for f in parts)


def all_bare_programs(rank):
    return {name: outcome(bare_program, name) for name in DEEPSPEED}


@pytest.mark.slow
def test_deepspeed_configurations_run_as_they_are():
    failures = spawn(all_bare_programs, 2)
    assert set(failures) == set(DEEPSPEED)
    assert not any(failures.values()), failures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "options", "described"),
    [
        pytest.param("zero3_offload", 2, (), "DeepSpeed ZeRO-3", marks=pytest.mark.exhaustive),
        pytest.param(
            *("hsdp", 4, ("--num_machines", 1, "--parallelism_config_dp_shard_size", 2), "HSDP"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_gpu_configurations_without_a_cpu_twin_run_where_there_is_no_gpu(tmp_path, name, processes, options, described):
    run = tmp_path / "run"
    output = launch(
        "--config", write_config(tmp_path), "--run_dir", run, "--train.max_steps", 4,
        processes=processes, engine=name, launch_options=options, through_accelerate=True,
    )  # fmt: skip
    assert f"{processes} processes on cpu (1 thread) with {described}, mixed precision bf16" in output
    assert len(training_rows(run)) == 4
