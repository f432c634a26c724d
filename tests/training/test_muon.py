"""Muon with AdamW as one optimizer: which parameter goes where, equal to torch's two by hand, and refused where it
cannot be right; and AdEMAMix, whose count of updates is not in its state.
"""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stacey_dist.errors import SettingsError
from stacey_dist.training.launchers import IMAGES, LLM
from stacey_dist.training.muon import hidden_matrices
from stacey_dist.training.optimizers import build_optimizer, check_engine, scheduled
from stacey_dist.training.settings import config as config_module
from stacey_dist.training.settings.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from tests.marks import needs_muon
from tests.shared import made_once
from tests.training.helpers import (
    assert_equal_checkpoints,
    checkpoint,
    launch,
    training_rows,
    write_config,
)

MUON = ("--optimizer.name", "muon")


def make_llama(**settings):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    return LlamaForCausalLM(LlamaConfig(**sizes, **settings))


@pytest.mark.parametrize("tied", [False, True])
def test_the_matrices_of_hidden_layers_are_muons(tied):
    model = make_llama(tie_word_embeddings=tied)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    chosen = hidden_matrices(model)
    names = {name for name, param in model.named_parameters() if param in chosen}
    projections = ["self_attn." + each for each in ("q_proj", "k_proj", "v_proj", "o_proj")]
    projections += ["mlp." + each for each in ("gate_proj", "up_proj", "down_proj")]
    expected = {f"model.layers.{i}.{each}.weight" for i in (0, 1) for each in projections}
    assert names == expected - {"model.layers.0.mlp.up_proj.weight"}


def backward(model, seed):
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()


@needs_muon
def test_it_is_torchs_muon_and_torchs_adamw_with_their_own_learning_rates_on_one_schedule():
    model, by_hand = make_llama(), make_llama()
    config = RunConfig(
        optimizer=OptimizerConfig("muon", lr=0.02, adamw_lr=0.005, weight_decay=0.2, momentum=0.9, betas=(0.7, 0.9)),
        schedule=ScheduleConfig("linear", warmup_steps=2),
        train=TrainConfig(max_steps=6),
    )
    optimizer = build_optimizer(model, config.optimizer, seed=0)
    matrices = hidden_matrices(by_hand)
    others = [p for p in by_hand.parameters() if p not in matrices]
    muon = torch.optim.Muon(list(matrices), weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    decays = [{"params": [p for p in others if p.dim() == d], "weight_decay": w} for d, w in ((2, 0.2), (1, 0.0))]
    adamw = torch.optim.AdamW(decays, betas=(0.7, 0.9), eps=1e-8, fused=True)
    for step in range(6):
        settings = scheduled(config, step)
        assert settings["adamw_lr"] / 0.005 == pytest.approx(settings["lr"] / 0.02)
        for group in optimizer.param_groups:
            group.update(settings)
        for part, lr in ((muon, settings["lr"]), (adamw, settings["adamw_lr"])):
            for group in part.param_groups:
                group["lr"] = lr
        for each, optimizers in ((model, [optimizer]), (by_hand, [muon, adamw])):
            backward(each, step)
            for one in optimizers:
                one.step()
                one.zero_grad()
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@needs_muon
def test_state_dicts_and_closures():
    def train(model, optimizer, seeds):
        for seed in seeds:
            optimizer.step(lambda seed=seed: backward(model, seed))
            optimizer.zero_grad()

    config = OptimizerConfig("muon")
    model = make_llama()
    optimizer = build_optimizer(model, config, seed=0)
    train(model, optimizer, (0, 1))
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, config, seed=0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, (2, 3))
    train(other, resumed, (2, 3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def build(model):
    numbers = dict(lr=0.02, adamw_lr=0.005, weight_decay=0.2, momentum=0.9, betas=(0.7, 0.9))
    return build_optimizer(model, OptimizerConfig("muon", **numbers), seed=0)


@needs_muon
@pytest.mark.parametrize("bias", [True, False])
def test_models_with_as_many_matrices_as_other_parameters_and_with_matrices_alone(bias):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=bias), torch.nn.Linear(4, 4, bias=bias))
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = build(model)
    assert [len(group["params"]) for group in optimizer.param_groups if "ns_steps" in group] == [2]
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert all((param != old).any() for param, old in zip(model.parameters(), before, strict=True))


def test_a_model_without_matrices_is_refused():
    with pytest.raises(SettingsError, match=r"optimizer.name: muon needs hidden matrices, and the model has none"):
        build(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)))


@pytest.mark.parametrize("engine", ["zero_redundancy", "deepspeed", "fsdp2"])
@pytest.mark.parametrize("name", ["muon", "ademamix"])
def test_engines_that_it_cannot_be_right_on_are_refused(name, engine):
    if (name, engine) == ("muon", "fsdp2"):
        return check_engine(name, engine)
    with pytest.raises(SettingsError, match=f"optimizer.name: {name} is not supported with {engine}; use single, ddp"):
        check_engine(name, engine)


@needs_muon
def test_without_its_package_and_for_images_it_is_refused(monkeypatch):
    check_engine("muon", "ddp")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SettingsError, match=r"optimizer.name: muon needs torch >= 2.9"):
        check_engine("muon", "ddp")
    for name in ("muon", "ademamix"):
        with pytest.raises(SettingsError, match=f"optimizer.name: {name} is not allowed; "):
            IMAGES.parse(["--optimizer.name", name])
    LLM.parse(["--optimizer.name", "ademamix"])
    monkeypatch.setattr(config_module, "is_installed", lambda module: module != "pytorch_optimizer")
    with pytest.raises(SettingsError, match="ademamix is not allowed; pytorch_optimizer is not installed; pip install"):
        LLM.parse(["--optimizer.name", "ademamix"])


def test_ademamix_counts_updates_and_warms_up_over_the_run():
    config = RunConfig(
        optimizer=OptimizerConfig("ademamix", lr=1.0, alpha=3.0, beta3=0.99), train=TrainConfig(max_steps=50)
    )
    settings = scheduled(config, 9, skipped=2)
    assert (settings["step"], settings["t_alpha_beta3"]) == (7, 50)
    model = make_llama()
    optimizer = build_optimizer(model, config.optimizer, seed=0)
    for group in optimizer.param_groups:
        assert settings.keys() <= group.keys()  # the engine sets them
        assert group["betas"] == (*config.optimizer.betas, 0.99)
        assert group["weight_decouple"]


def train_without_a_stop(directory, name):
    config = write_config(directory, train={"max_steps": 20, "eval_every_steps": 20}, checkpoint={"every_steps": 10})
    launch("--config", config, "--optimizer.name", name, "--run_dir", directory / name)
    return directory, config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        pytest.param("muon", "momentum_buffer exp_avg exp_avg_sq step", marks=needs_muon),
        ("ademamix", "exp_avg exp_avg_sq exp_avg_slow"),
    ],
)
def test_a_resumed_run_is_equal_to_an_uninterrupted_one(tmp_path, name, kinds):
    directory, config = made_once(train_without_a_stop, name)
    states = checkpoint(directory / name, 20)
    assert {key.rsplit("/", 1)[1] for key in states if key.startswith("optimizer/")} == set(kinds.split())
    source = directory / name / "checkpoints/step_00000010"
    resumed = ("--optimizer.name", name, "--run_dir", tmp_path / "run", "--checkpoint.resume_from", source)
    launch("--config", config, *resumed)
    assert_equal_checkpoints(tmp_path / "run", directory / name, 20)


@needs_muon
@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    directory, config = made_once(train_without_a_stop, "muon")
    for engine, begun in (("cpu_ddp", 0), ("cpu_fsdp2", 10)):
        source = ("--checkpoint.resume_from", directory / "muon/checkpoints/step_00000010") if begun else ()
        launch("--config", config, *MUON, "--run_dir", tmp_path / engine, *source, processes=2, engine=engine)
        ours, reference = training_rows(tmp_path / engine), training_rows(directory / "muon")
        assert reference[-1]["loss"] < reference[0]["loss"] - 0.1
        for a, b in zip(ours, reference[begun:], strict=True):  # torch makes matrices orthogonal in bfloat16, 8 bits
            assert a["loss"] == pytest.approx(b["loss"], rel=2**-12)
    output = launch("--config", config, *MUON, "--run_dir", tmp_path / "b", processes=2, engine="cpu_zero2", expect=2)
    assert "optimizer.name: muon is not supported with deepspeed" in output
