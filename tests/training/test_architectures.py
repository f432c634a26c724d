"""Six architectures train on each kind of engine, resume exactly, and leave models that transformers loads."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from stacey_dist.models.causal_lm import causal_config, new_model
from stacey_dist.training.initial_weights import initial_weights
from tests.models.architectures import ARCHITECTURES, described
from tests.shared import made_once
from tests.training.forked import Forked
from tests.training.helpers import SMOOTH, assert_equal_checkpoints, checkpoint, training_rows, write_config_of_others

pytestmark = pytest.mark.slow
PROGRAM = "tests/training/in_turn.py"
# On one process: dropout has a state, and experts are tensors of another kind. The others have the same names and bits
# there as on several processes, where each of them resumes.
RESUMED_ALONE = ("gpt_neox", "mixtral")
IN_CI = ("gemma3_text", "gpt_neox", "mixtral")  # on several processes: tied, with dropout, with experts
# On several processes; one process keeps all activations, and has the same results.
RECOMPUTED = {"qwen3": "true", "llama": "selective", "gpt_neox": "selective", "mixtral": "selective"}


def prepare(directory):
    train = {"max_steps": 4, "eval_every_steps": 4, "micro_batch_size": 4}
    config = write_config_of_others(directory, train=train, checkpoint={"every_steps": 2})
    for kind in ARCHITECTURES:
        (directory / f"{kind}.json").write_text(json.dumps(described(kind)))
    return directory, config


@pytest.fixture(scope="module")
def prepared():
    """A directory with the data, a configuration, and a config.json of each architecture."""
    return made_once(prepare)


def run_all(place, prepared, engine, processes, kinds=tuple(ARCHITECTURES)):
    """Train some architectures, and once more from the checkpoint in the middle; return where, and what was printed."""
    directory, config = prepared
    resumed = kinds if processes > 1 else RESUMED_ALONE
    runs = []
    for kind in kinds:
        own = ["--config", config, "--model.config", directory / f"{kind}.json", *SMOOTH]
        if processes > 1:
            own += ["--train.gradient_checkpointing", RECOMPUTED.get(kind, "false")]
        middle = place / kind / "checkpoints/step_00000002"
        runs.append([*own, "--run_dir", place / kind])
        if kind in resumed:
            runs.append([*own, "--run_dir", place / f"{kind}-resumed", "--checkpoint.resume_from", middle])
    (place / "runs.json").write_text(json.dumps([[str(word) for word in run] for run in runs]))
    forked = Forked(program=PROGRAM, processes=processes, engine=engine, RUNS=place / "runs.json")
    output, status = forked.wait(seconds=550)
    assert status == 0, output[-5000:]
    for kind in resumed:
        assert_equal_checkpoints(place / kind, place / f"{kind}-resumed", 4)
    return place, output


@pytest.fixture(scope="module")
def one_process(prepared):
    return made_once(run_all, prepared, None, 1)


def test_one_process_says_what_it_trains(one_process):
    place, output = one_process
    for kind, parameters in {"llama": "41,312", "gpt_neox": "40,672", "mixtral": "106,144"}.items():
        name = {"llama": "Llama", "gpt_neox": "GPTNeoX", "mixtral": "Mixtral"}[kind]
        active = " (50,848 active)" if kind == "mixtral" else ""
        assert f"model: {name}ForCausalLM with {parameters} parameters{active}; stacey" in output
    # an export has the architecture and the weights of the last checkpoint
    for kind in ("gemma3_text", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(place / kind / "model")
        assert model.config.model_type == kind
        trained = checkpoint(place / kind, 4)
        for name, param in model.named_parameters():
            assert torch.equal(param, trained[f"model/{name}"])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_one_process_begins_with_the_weights_of_the_seed_and_learns(one_process, kind):
    place, _ = one_process
    (weights, _) = torch.load(f"{place / kind}.0.pt")
    initial = initial_weights(0, lambda: new_model(causal_config(described(kind) | {"pad_token_id": None})))
    assert weights.keys() == initial.writes.keys()
    for name, (_, weight) in weights.items():
        assert torch.equal(weight.flatten(), initial.values(name, 0, weight.numel())), name
    losses = [row["loss"] for row in training_rows(place / kind)]
    assert min(losses[1:]) < losses[0] - 0.005
    assert all(row["grad_norm"] > 0 for row in training_rows(place / kind))


@pytest.mark.parametrize(("engine", "kinds"), [
    ("cpu_fsdp2", IN_CI),
    *(
        pytest.param(engine, tuple(ARCHITECTURES), marks=pytest.mark.exhaustive)
        for engine in ("cpu_ddp", "cpu_zero_redundancy", "cpu_zero2", "cpu_zero3", "cpu_fsdp2")
    ),
])  # fmt: skip
def test_engines_train_as_one_process(prepared, one_process, tmp_path, engine, kinds):
    place, _ = run_all(tmp_path, prepared, engine, 2, kinds)
    for kind in kinds:
        whole, _ = torch.load(f"{one_process[0] / kind}.0.pt")
        made = 0
        for rank in range(2):
            weights, sharded = torch.load(f"{place / kind}.{rank}.pt")
            for name, (start, weight) in weights.items():
                stop = start + weight.numel()
                assert torch.equal(weight.flatten(), whole[name][1].flatten()[start:stop]), name
                made += weight.numel()
            assert engine != "cpu_fsdp2" or any(name.endswith("Layer") for name in sharded)
        elements = sum(weight.numel() for _, weight in whole.values())
        assert made in (elements, 2 * elements)
        if kind == "gpt_neox":  # dropout differs where the batch is split differently
            continue
        for ours, reference in zip(training_rows(place / kind), training_rows(one_process[0] / kind), strict=True):
            assert ours["loss"] == pytest.approx(reference["loss"], abs=2e-5)  # float32 sums, over 4 updates
            assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
