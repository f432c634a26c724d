"""`stacey-dist plan`: its tables, its errors, its search, and the configurations that it is for."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stacey_dist.cli import main
from stacey_dist.models.causal_lm import causal_config, new_model
from stacey_dist.plan import Job, checkpoint_bytes, make_plan, memory, planned_model, report
from stacey_dist.plan.hardware import GPUS, find_gpu
from stacey_dist.plan.memory import ENGINES
from stacey_dist.plan.model import VOCABULARIES, make_model
from stacey_dist.plan.plans import largest_micro_batch, peak_bytes
from stacey_dist.training.launchers import LLM
from stacey_dist.training.tasks.llm import LanguageModeling
from stacey_dist.training.tasks.llm_model import build_model
from tests.models.architectures import ARCHITECTURES, described

CONFIGS = Path(__file__).parents[2] / "configs/llm"
SIZES = {  # as the papers and model cards have them; 100M and 1B as GaLore
    "100m_c4": 100_117_120,
    "1b": 1_339_082_752,
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "70b": 68_976_648_192,
}
ON_64 = ("--nodes", "8", "--gpus-per-node", "8")


def config_of(name, *options):
    return LLM.parse(["--config", str(CONFIGS / f"llama_{name}.yaml"), *options])


def plan(capsys, name, *options, status=0):
    assert main(["plan", "--config", str(CONFIGS / f"llama_{name}.yaml"), *options]) == status
    printed = capsys.readouterr()
    return printed.err if status else printed.out


@pytest.mark.parametrize("name", SIZES)
def test_the_configurations_have_their_sizes(name):
    config = config_of(name)
    assert planned_model(config).elements == SIZES[name]
    assert config.tokenizer.name in VOCABULARIES
    assert config.run_dir == f"runs/llama_{name}"


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_that_is_planned_is_the_one_that_is_built(tied):
    config = config_of("70b", "--model.num_hidden_layers", "3", "--model.tie_word_embeddings", str(tied).lower())
    accelerator = SimpleNamespace(device=torch.device("meta"), mixed_precision="no")
    run = SimpleNamespace(config=config, accelerator=accelerator, say=lambda text: None)
    with torch.device("meta"):
        built = build_model(run, SimpleNamespace(vocab_size=1013, end_token_id=0))
    planned = planned_model(config, 1013)
    assert [(p.name, p.shape) for p in planned.parameters] == [(n, tuple(p.shape)) for n, p in built.named_parameters()]
    assert {p.name for unit in planned.units for p in unit} == {p.name for p in planned.parameters}
    run.process_batch_size = run.micro_batch_size = 1
    corpus = SimpleNamespace(name="", share=1, train=Stream(), validation=Stream())
    data = SimpleNamespace(corpora=[corpus], identity="stream", end_token_id=0)
    flops = LanguageModeling(run, data, built).flops_per_unit
    assert planned.flops_per_token == flops


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_any_architecture_is_planned_by_its_own_modules(kind):
    found, model = make_model(described(kind), 16), new_model(causal_config(described(kind)))
    assert [(p.name, p.shape) for p in found.parameters] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    inside = [p for unit in found.units for p in unit]
    assert sorted(p.name for p in inside) == sorted(p.name for p in found.parameters)
    assert len(found.units) == 2 + (2 if found.head and not model.config.tie_word_embeddings else 1)


def test_a_mixture_of_experts(capsys):
    mixtral = str(CONFIGS.parent / "models/mixtral_8x7b.json")
    options = ["--model.config", mixtral, "--nodes", "4", "--global-batch-size", "256", "--micro-batch-size", "1"]
    main(["plan", *options])
    text = capsys.readouterr().out
    # as published: 46.7 B parameters, of which a token uses 12.9 B
    assert "MixtralForCausalLM of 46.7 B parameters (12.9 B active; 45.1 B, 97%, in experts) on 32 x h100-80gb" in text
    assert "gradient checkpointing off" in text
    peaks = []
    for kind in ("false", "selective", "true"):
        main(["plan", *options, "--train.gradient_checkpointing", kind, "--json"])
        (stacey, _) = json.loads(capsys.readouterr().out)["plans"]
        assert (stacey["parameters"], stacey["expert_parameters"]) == (46_702_792_704, 32 * 8 * 3 * 4096 * 14336)
        assert stacey["active_parameters"] == 46_702_792_704 - stacey["expert_parameters"] * 6 // 8
        peaks.append((stacey["peak_bytes"], stacey["seconds"]["arithmetic"]))
    (off, time), (selective, same), (on, longer) = peaks
    assert off > selective > on
    assert time == same < longer


class Stream:
    def __len__(self):
        return 1


def test_importing_the_plan_imports_no_launcher():
    heavy = ["transformers", "accelerate", "datasets", "matplotlib", "deepspeed", "pyarrow", "PIL"]
    code = f"import sys, stacey_dist.plan; print(sorted(set({heavy!r}) & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parents[1], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


def test_the_table(capsys):
    text = plan(capsys, "7b", "--engine", "zero3", "--gpu", "h100-80gb", *ON_64)
    assert "LLaMA of 6.74 B parameters on 64 x h100-80gb (8 nodes of 8): zero3, mixed precision bf16" in text
    assert "on a GPU 16 micro-batches of 2, gradient checkpointing on" in text
    assert "not measured on a GPU" in text
    rows = {line[:50].strip(): line[50:].split() for line in text.splitlines()}
    assert rows["masters"] == ["0.392", "0.392"]  # 4 bytes x 6.74 B / 64
    assert (rows["z"], rows["exp_avg"]) == (["0.196", "–"], ["–", "0.392"])
    assert max(map(len, text.splitlines())) <= 120


def test_the_json_is_in_bytes(capsys):
    plans = json.loads(plan(capsys, "7b", "--engine", "zero3", *ON_64, "--json"))["plans"]
    stacey, adamw = plans
    slices = stacey["device_bytes"]["masters"] // 4
    assert 0 <= slices * 64 - SIZES["7b"] < 64 * 300  # each of 291 parameters is padded to 64
    sizes = {"weights": 2, "gradients": 4, "masters": 4, "z": 2, "m": 2}
    assert stacey["device_bytes"] == {name: size * slices for name, size in sizes.items()}
    assert adamw["peak_bytes"] - stacey["peak_bytes"] == 4 * slices
    parts = [sum(stacey[key].values()) for key in ("device_bytes", "buffer_bytes")]
    assert stacey["peak_bytes"] == sum(parts) + stacey["activation_bytes"]["at_peak"]
    low, high = stacey["tokens_per_second"]
    fast, slow = stacey["seconds"]["update"]
    assert (low * slow, high * fast) == (pytest.approx(2048 * 2048), pytest.approx(2048 * 2048))
    # 989 TFLOP/s a GPU, with nothing but arithmetic at 65 % of it
    arithmetic, _ = stacey["seconds"]["arithmetic"]
    head = 6 * 32_000 * 4096
    flops = (planned_model(config_of("7b")).flops_per_token * 4 - head) / 3 * 2048 * 2048
    assert arithmetic == pytest.approx(flops / 64 / 989e12 / 0.65)


def test_a_ring_moves_what_it_must():
    job = Job(config_of("7b"), planned_model(config_of("7b")), "ddp", 8, 8)
    gpu = find_gpu("h100-80gb")
    (gradients,) = make_plan(job, gpu).speed.transfers
    assert gradients.sent_bytes == pytest.approx(2 * 63 / 64 * 4 * SIZES["7b"])
    assert gradients.seconds == pytest.approx(gradients.sent_bytes / 400e9)  # 8 cards of 50 GB/s, less than NVLink


def test_a_checkpoint_has_masters_and_states_once():
    config = config_of("7b")
    whole, share = checkpoint_bytes(Job(config, planned_model(config), "fsdp2", 8, 8))
    assert whole == 8 * SIZES["7b"] + 8 * 291
    assert share == SIZES["7b"] * 8 // 64


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2", "zero3_offload"])
def test_the_largest_micro_batch_fits_and_the_next_does_not(engine):
    config = config_of("1b")
    job, room = Job(config, planned_model(config), engine, 1, 8), 60e9
    largest = largest_micro_batch(job, room)
    at = [peak_bytes(job.with_batch(micro, batch=16 * micro)) for micro in (largest, largest + 1)]
    assert at[0] <= room < at[1]


def test_search_proposes_what_fits_and_divides_the_batch(capsys):
    arguments = ("1b", "--gpu", "a100-40gb", "--nodes", "2", "--search")
    found = json.loads(plan(capsys, *arguments, "--json"))["proposals"]
    assert {p["engine"] for p in found} >= {"ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp"}
    assert "single" not in {p["engine"] for p in found}
    for proposal in found:
        assert proposal["fits"]
        assert proposal["peak_bytes"] <= 0.9 * 40e9
        assert proposal["micro_batch_size"] * proposal["accumulation"] * 16 == proposal["global_batch_size"] == 512
    speeds = [p["tokens_per_second"][0] for p in found]
    assert speeds == pytest.approx(sorted(speeds, reverse=True), rel=1e-2)
    best = found[0]
    text = plan(capsys, *arguments)
    assert f"--train.micro_batch_size {best['micro_batch_size']}" in text
    assert max(map(len, text.splitlines())) <= 120
    nothing = plan(capsys, "70b", "--memory-gb", "4", "--search")
    assert "nothing fits into 3.35 GiB of a h100-80gb" in nothing


def test_a_search_of_fast_updates_begins_with_the_fastest(capsys):
    """Updates of a few milliseconds, which differ by less than one."""
    found = json.loads(plan(capsys, "100m_c4_p2_paper", "--search", "--json"))
    speeds = [proposal["tokens_per_second"][0] for proposal in found["proposals"]]
    assert speeds == pytest.approx(sorted(speeds, reverse=True), rel=1e-2)


def test_numbers_have_three_digits():
    assert [report._number(value) for value in (0, 0.5, 99.96, 999.4, 999.7, 12_345)] == [
        "–", "0.500", "100", "999", "1,000", "12,300"
    ]  # fmt: skip
    assert [report._count(value) for value in (999, 999_400, 999_700, 999_700_000)] == ["999", "999 k", "1 M", "1 B"]


def test_every_engine_and_gpu_has_a_table(capsys):
    for engine in ENGINES:
        where = ("--nodes", "2") if engine == "hsdp" else ("--gpus-per-node", "1") if engine == "single" else ()
        text = plan(capsys, "100m_c4", "--engine", engine, *where)
        assert "tokens per second" in text
        assert ("host memory" in text) == (engine == "zero3_offload")
    for gpu in GPUS:
        assert gpu in plan(capsys, "100m_c4", "--gpu", gpu)


def test_options_of_the_launcher_are_options_of_the_plan(capsys):
    changed = plan(
        capsys, "100m_c4", "--optimizer.state_dtype", "float32", "--mixed-precision", "no", "--micro-batch-size", "1",
        "--no-gradient-checkpointing", "--json",
    )  # fmt: skip
    stacey = json.loads(changed)["plans"][0]
    assert stacey["device_bytes"]["z"] == stacey["device_bytes"]["weights"]
    assert (stacey["accumulation"], stacey["gradient_checkpointing"]) == (2, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engin", "zero3"], "unknown option --engin; did you mean --engine?"),
        (["--memory-gb", "inf"], "--memory-gb: inf is not allowed; it must be > 0, and at most 1,000,000"),
        (["--memory-gb", "1e300"], "--memory-gb: 1e+300 is not allowed; it must be > 0, and at most 1,000,000"),
        (["--memory-gb", "nan"], "--memory-gb: nan is not allowed; it must be > 0, and at most 1,000,000"),
        (["--engine", "zero33"], "--engine: zero33 is not known; did you mean zero3? there are single, ddp"),
        (["--engine", "FSDP"], "did you mean fsdp2?"),
        (["--gpu", "h100"], "--gpu: h100 is not known; did you mean h100-80gb? there are a100-40gb"),
        (["--engine", "single"], "--engine: single is one process, and there are 8"),
        (["--engine", "hsdp"], "--engine: hsdp keeps replicas on several nodes"),
        (["--engine", "zero2", "--offload"], "--offload: it goes with --engine zero3, not zero2"),
        (["--nodes", "3"], "train.global_batch_size: 16 is not a multiple of the 24 GPUs"),
        (["--micro-batch-size", "16"], "train.micro_batch_size: 16 does not divide train.global_batch_size / GPUs = 2"),
        (["--optimizer", "muon"], "optimizer.name: muon is not planned yet"),
        (["--optimizer", "ademamix", "--engine", "zero2"], "optimizer.name: ademamix is not supported with deepspeed"),
        (["--model.attention", "eager"], "model.attention: eager is not planned"),
        (["--data.document_mask", "true"], "data.document_mask: true is not planned"),
        (["--nodes", "0"], "--nodes: 0 is not allowed; it must be >= 1"),
        (["--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
        (["--efficiency", "0.6"], "--efficiency: 0.6 is not allowed; it must be LOW,HIGH"),
        (["--margin", "1"], "--margin: 1.0 is not allowed"),
        (["--host-gbs", "0"], "--host-gbs: 0.0 is not allowed; it must be > 0"),
        (["--vocab-size", "0"], "--vocab-size: 0 is not allowed; it must be >= 1"),
        (["--tokenizer.name", "gpt2"], "the vocabulary of gpt2 is not known without loading it"),
        (["--model.dtype", "bfloat16"], "model.dtype: bfloat16 is planned without mixed precision"),
    ],
)
def test_what_is_not_allowed_is_said_in_a_line(capsys, options, message):
    error = plan(capsys, "100m_c4", *options, status=2)
    assert error.startswith("stacey-dist plan: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_sequence_that_is_too_long_for_the_model(capsys):
    described = str(CONFIGS.parent / "models/qwen3_small.json")
    assert main(["plan", "--model.config", described, "--data.sequence_length", "100000"]) == 2
    assert capsys.readouterr().err.startswith("stacey-dist plan: error: data.sequence_length: 100000 is not allowed; ")


def test_a_mistyped_setting_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--train.micro_batch", "4"])
    assert "did you mean --train.micro_batch_size?" in capsys.readouterr().err


def test_the_examples_of_the_documentation_are_what_is_printed(capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])
    examples = re.findall(r"```\n\$ stacey-dist (plan .*)\n([^`]*)```", Path("docs/how-to/plan.md").read_text())
    assert len(examples) == 3
    for command, printed in examples:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == printed


def test_help_says_what_was_not_measured(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "peaks and times were not measured on a GPU" in " ".join(capsys.readouterr().out.split())


def test_a_model_of_bfloat16_has_no_masters():
    config = config_of("1b", "--model.dtype", "bfloat16", "--train.mixed_precision", "no")
    job = Job(config, planned_model(config), "fsdp2", 1, 8)
    device = ENGINES["fsdp2"](job, 0).device
    assert device["masters"] == 0
    rows = 24 * 2 * 3 * 2048  # 5 461 rows of gate and up in 24 layers are cut as 5 464; rank 0 has no padding
    assert device["weights"] == device["z"] == 2 * (SIZES["1b"] + rows) // 8


def test_several_configurations_are_merged_as_the_launchers_do(capsys, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("model: {num_hidden_layers: 2}\n")
    shallow = plan(capsys, "7b", *ON_64, "--model.num_hidden_layers", "2")
    merged, deep = plan(capsys, "7b", "--config", str(over), *ON_64), plan(capsys, "7b", *ON_64)
    planned = [text.partition("to start it:")[0] for text in (merged, shallow, deep)]
    assert planned[0] == planned[1] != planned[2]


def test_the_command_that_is_printed_starts_what_was_planned(capsys, tmp_path):
    file = tmp_path / "a file.yaml"
    file.write_text("train: {global_batch_size: 24}\n")
    options = ["--config", str(file), "--gpus-per-node", "3", "--optimizer", "lion", "--optimizer.lr=0.5"]
    text = plan(capsys, "100m_c4", *options, "--micro-batch-size", "4")
    command = text.partition("to start it:\n")[2].partition("\n\n")[0]
    words = shlex.split(command.replace("\\\n", ""))
    start = words.index("train_llm.py")
    file = "configs/accelerate/fsdp2.yaml"
    assert words[:start] == ["accelerate", "launch", "--config_file", file, "--num_processes", "3"]
    config = LLM.parse(words[start + 1 :])
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (24, 4)
    assert (config.optimizer.name, config.optimizer.lr) == ("lion", 0.5)
    micro = plan(capsys, "1b", "--search", "--train.micro_batch_size", "1").replace(" \\\n ", "")
    words = micro.partition("to start the first one:\n")[2].partition("\n\n")[0].split()
    best = json.loads(plan(capsys, "1b", "--search", "--json"))["proposals"][0]
    assert LLM.parse(words[words.index("train_llm.py") + 1 :]).train.micro_batch_size == best["micro_batch_size"] > 1
    assert "configs/accelerate/gpu.yaml train_llm.py" in plan(capsys, "100m_c4", "--gpus-per-node", "1")
    searched = plan(capsys, "1b", "--nodes", "2", "--search")
    nodes = "--num_processes 16 --num_machines 2 --machine_rank RANK --main_process_ip HOST"
    assert nodes in searched.replace(" \\\n ", "")
    hsdp = plan(capsys, "1b", "--engine", "hsdp", "--nodes", "2", "--gpus-per-node", "4").replace(" \\\n ", "")
    mesh = "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 4"
    assert f"hsdp.yaml --num_processes 8 {mesh} --num_machines 2" in hsdp
    unsaid = plan(capsys, "1b", "--model.dtype", "bfloat16", "--train.mixed_precision", "null")
    assert "--train.mixed_precision null --train.mixed_precision no\n" in unsaid.replace(" \\\n ", "")


def test_a_search_chooses_the_engine_and_the_micro_batch_itself(capsys):
    assert "micro" in str(plan(capsys, "1b", "--nodes", "16", "--search"))
    # An optimizer that fsdp2 does not shard runs on the others.
    found = json.loads(plan(capsys, "100m_c4", "--search", "--optimizer", "ademamix", "--json"))["proposals"]
    assert "ddp" in {each["engine"] for each in found}
    assert "--search, which tries all" in str(plan(capsys, "1b", "--search", "--engine", "zero2", status=2))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 333])
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero_redundancy"])
def test_the_fullest_rank_is_found(engine, ranks):
    options = ("--model.hidden_size", "12", "--model.intermediate_size", "53", "--model.num_hidden_layers", "2")
    config = config_of("100m_c4", *options, "--model.num_attention_heads", "3", "--train.global_batch_size", str(ranks))
    config.train.micro_batch_size = 1
    job = Job(config, planned_model(config, 101), engine, 1, ranks)
    kept = [sum(ENGINES[engine](job, rank).device.values()) for rank in range(ranks)]
    assert memory.most_loaded_rank(job)[0] == kept.index(max(kept))


def test_the_job_with_adamw_differs_in_the_optimizer_alone():
    job = Job(config_of("1b", "--optimizer.decay_norms_and_biases", "true"), None, "fsdp2", 1, 8).with_adamw()
    assert job.config.optimizer.name == "adamw"
    assert job.config.optimizer.decay_norms_and_biases


def test_zero3_has_its_bucket_and_small_weights_in_the_update_too():
    config = config_of("7b", "--data.sequence_length", "8", "--train.micro_batch_size", "1")
    job = Job(config, planned_model(config), "zero3", 1, 2)
    _, found = memory.most_loaded_rank(job)
    moment = sum(found.buffers[name] for name in ("gradient bucket", "small weights"))
    assert found.update - moment >= 1e9 * 4  # the gradient of a group of 1e9 elements, made flat
    assert peak_bytes(job) == sum(found.device.values()) + found.update
