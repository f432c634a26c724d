"""Training continues from published weights, with the model's own tokenizer or another one."""

import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stacey_dist.data.tokenizer import train_sentencepiece
from stacey_dist.errors import SettingsError
from stacey_dist.models.causal_lm import causal_config, new_model
from stacey_dist.training.initial_weights import initial_weights
from stacey_dist.training.launchers import LLM
from stacey_dist.training.tasks import llm_model
from stacey_dist.training.tasks.text_data import tokenize
from tests.models.architectures import described
from tests.shared import made_once
from tests.training.helpers import checkpoint, launch, rows, write_config_of_others

KIND = "mixtral"  # published with an expert in each tensor, where the model has all of them in one


def publish(directory):
    train = {"max_steps": 1, "eval_every_steps": 1}
    config = write_config_of_others(directory, train=train, optimizer={"lr": 0.0, "tau": 0.0})
    text = (directory / "text.txt").read_text().split("\n\n")
    for name, vocabulary in (("model", 390), ("extended", 405)):
        torch.manual_seed(1)
        new_model(causal_config(described(KIND))).save_pretrained(directory / name)
        train_sentencepiece(text, vocabulary, directory / f"{name}-tokenizer").save(directory / name)
        (directory / name / "pytorch_model.bin").write_bytes(b"a pickle")
    return directory, config


@pytest.fixture(scope="module")
def published():
    """A configuration, and directories of models with their tokenizers, as others publish them."""
    return made_once(publish)


def weights_of(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    return {name: param.detach() for name, param in model.named_parameters()}


def trained(run):
    return {name.removeprefix("model/"): t for name, t in checkpoint(run, 1).items() if name.startswith("model/")}


@pytest.mark.slow
@pytest.mark.parametrize("engine", [
    "single",
    *(pytest.param(engine, marks=pytest.mark.exhaustive) for engine in ("cpu_fsdp2", "cpu_zero2", "cpu_zero3")),
])  # fmt: skip
def test_weights_of_all_kinds_of_tokenizers(published, tmp_path, engine):
    directory, config = published
    new = directory / "extended-tokenizer/tokenizer.model"
    cases = {
        "own": ["--model.pretrained", directory / "model"],
        "more tokens": ["--model.pretrained", directory / "extended"],
        "kept": ["--model.pretrained", directory / "model", "--tokenizer.file", new, "--model.embeddings", "keep"],
        "new": ["--model.pretrained", directory / "model", "--tokenizer.vocab_size", 380, "--model.embeddings", "new"],
    }
    runs = [["--config", config, *options, "--run_dir", tmp_path / name] for name, options in cases.items()]
    (tmp_path / "runs.json").write_text(json.dumps([[str(word) for word in run] for run in runs]))
    how = {} if engine == "single" else {"engine": engine, "processes": 2}
    output = launch(program="tests/training/in_turn.py", RUNS=tmp_path / "runs.json", **how)
    assert f"106,144 parameters (50,848 active), weights of {directory / 'model'}; stacey" in output
    before = weights_of(directory / "model")
    own = trained(tmp_path / "own")
    assert own.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.items())
    for name in ("more tokens", "kept"):
        assert "embeddings: 5 rows are new, of 405" in output
        assert_embeddings(trained(tmp_path / name), before, kept=400, size=405)
    assert "embeddings: 380 rows are new, of 380" in output
    assert_embeddings(trained(tmp_path / "new"), before, kept=0, size=380)
    exported = weights_of(tmp_path / "kept/model")
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained(tmp_path / "kept").items())


def assert_embeddings(found, before, kept, size):
    """The first rows are kept; the others are those of a model that begins from nothing."""
    changes = {"vocab_size": size, "pad_token_id": None}
    initial = initial_weights(0, lambda: new_model(causal_config(described(KIND) | changes)))
    for name, tensor in found.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(tensor) == size
            assert torch.equal(tensor[:kept], before[name][:kept])
            assert torch.equal(tensor[kept:].flatten(), initial.values(name, 32 * kept, 32 * size))
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.slow
def test_a_trained_model_is_where_the_next_run_begins(published, tmp_path):
    directory, config = published
    launch("--config", config, "--model.config", directory / "model", "--run_dir", tmp_path / "a")
    launch("--config", config, "--model.pretrained", tmp_path / "a/model", "--run_dir", tmp_path / "b")
    losses = [[row["eval_loss"] for row in rows(tmp_path / run) if "eval_loss" in row] for run in "ab"]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_architecture(published, tmp_path):
    _, config = published
    (tmp_path / "a.json").write_text(json.dumps(described("gpt_neox")))
    run = ("--config", config, "--model.config", tmp_path / "a.json", "--run_dir", tmp_path / "run")
    launch(*run)
    (tmp_path / "a.json").write_text(json.dumps(described("gpt_neox") | {"use_parallel_residual": False}))
    output = launch(*run, "--train.max_steps", 2, expect=2)
    assert f"model: use_parallel_residual in {tmp_path / 'a.json'}: True in the checkpoint, False now" in output
    allowed = ("--checkpoint.allow_changes", "model.config")
    assert "after 1 updates" in launch(*run, *allowed, "--train.max_steps", 2)


def without(name):
    return lambda directory: (directory / name).unlink()


def without_a_layer(directory):
    weights = load_file(directory / "model.safetensors")
    save_file(
        {k: t for k, t in weights.items() if "layers.1.self_attn.q_proj" not in k}, directory / "model.safetensors"
    )


def as_config(**changes):
    def change(directory):
        found = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(found | changes))

    return change


def elsewhere(directory):
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


BAD_MODELS = [
    (without("config.json"), "config.json"),
    (without("model.safetensors"), "has no safetensors, and other formats of weights are not read"),
    (elsewhere, "has no safetensors, and other formats of weights are not read"),
    (without("tokenizer.json"), "tokenizer"),
    (as_config(model_type="mine", auto_map={"AutoConfig": "code.Config"}), "code that comes with a model is not run"),
    (as_config(model_type="t5"), "model_type t5 is an encoder-decoder; it must be a decoder alone"),
    (as_config(model_type="bert"), "model_type bert is not a causal language model"),
    (
        as_config(model_type="gemma3"),
        "model_type gemma3 takes more than text; give the configuration that is its text_",
    ),
    (as_config(num_hidden_layers="two"), "config.json"),
    (as_config(max_position_embeddings=8), "data.sequence_length: 16 is not allowed; "),
]


@pytest.mark.parametrize(("damage", "message"), BAD_MODELS, ids=[message[:30] for _, message in BAD_MODELS])
def test_a_model_that_cannot_be_continued_is_refused_before_data_are_prepared(published, tmp_path, damage, message):
    directory, config = published
    shutil.copytree(directory / "model", tmp_path / "model")
    damage(tmp_path / "model")
    parsed = LLM.parse(["--config", str(config), "--model.pretrained", str(tmp_path / "model")])
    parsed.data.cache_dir = str(tmp_path / "cache")
    with pytest.raises(SettingsError, match=r"^(model.pretrained|data.sequence_length): ") as error:
        tokenize(parsed)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused(published, tmp_path):
    directory, config = published
    shutil.copytree(directory / "model", tmp_path / "model")
    for damage, message in (
        (without_a_layer, "has no weights for model.layers.1.self_attn.q_proj.weight, and 0 others"),
        (as_config(intermediate_size=40), "model.pretrained: "),
        (as_config(num_attention_heads=5), "model.pretrained: "),
    ):
        damage(tmp_path / "model")
        options = ("--model.pretrained", tmp_path / "model", "--run_dir", tmp_path / "run")
        output = launch("--config", config, *options, expect=2)
        error = output[output.rindex("train_llm.py: error: ") :]
        assert message in error
        assert len(error.splitlines()) == 1
        assert "Traceback" not in output


def test_a_vocabulary_that_is_too_small_is_refused_before_data_are_prepared(published, tmp_path):
    _, config = published
    (tmp_path / "config.json").write_text(json.dumps(described("llama") | {"vocab_size": 399}))
    parsed = LLM.parse(["--config", str(config), "--model.config", str(tmp_path), "--tokenizer.vocab_size", "400"])
    parsed.data.cache_dir = str(tmp_path / "cache")
    with pytest.raises(
        SettingsError, match=r"model.config: .* has a vocabulary of 399 tokens, and the tokenizer one of 40"
    ):
        tokenize(parsed)
    assert not list((tmp_path / "cache").glob("*/train*"))


def test_a_name_of_the_hub_is_downloaded_without_pickles_and_code(published, monkeypatch):
    directory, config = published
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(directory / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(directory / "model" / file))
    tokenize(LLM.parse(["--config", str(config), "--model.pretrained", "someone/model"]))
    (name, patterns) = asked[0]
    assert name == "someone/model"
    files = ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "modeling_mine.py", "x.pt"]
    assert [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)] == files[:3]


def test_a_name_that_is_nowhere_is_one_line(published, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # its client would try for a minute
    _, config = published
    for setting in ("config", "pretrained"):
        with pytest.raises(
            SettingsError, match=f"^model.{setting}: no/such-model is neither a file, a directory"
        ) as error:
            tokenize(LLM.parse(["--config", str(config), f"--model.{setting}", "no/such-model"]))
        assert len(str(error.value).splitlines()) == 1


def test_weights_in_bfloat16_rotate_by_exact_frequencies():
    config = causal_config(described("llama") | {"rope_theta": 5e5})
    exact, cast = new_model(config), llm_model._cast(new_model(config), torch.bfloat16)
    assert {param.dtype for param in cast.parameters()} == {torch.bfloat16}
    assert torch.equal(cast.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(published, tmp_path, dtype):
    directory, config = published
    shutil.copytree(directory / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = min(weights)
    save_file({**weights, name: weights[name].to(dtype)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    options = ["--config", config, "--model.pretrained", tmp_path / "model", "--run_dir", tmp_path / "run"]
    output = launch(*options, expect=2)
    kind = str(dtype).removeprefix("torch.")
    assert f"model.pretrained: {tmp_path / 'model'}: {name} is of {kind}; quantized weights are not read" in output
