"""What leaves a run: a model with its tokenizer and its card, here and on the hub; its held-out loss is the card's."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stacey_dist.cli import main
from stacey_dist.data import TokenStream
from stacey_dist.errors import SettingsError
from stacey_dist.models.export import describe_export, loader
from stacey_dist.models.export_directory import MARKER
from stacey_dist.training.export import check_upload, push
from stacey_dist.training.launchers import LLM
from stacey_dist.training.reports.card import _data, _shown
from stacey_dist.training.settings.command_line import to_dict
from stacey_dist.training.settings.config import HubConfig
from stacey_dist.training.settings.llm_config import LLMConfig, SourceConfig
from tests.shared import made_once
from tests.training.helpers import launch, rows, write_config
from tests.training.hub import TOKEN, stand_in

PROGRAM = "tests/training/uploading.py"
STEPS = 6


def train_and_upload(directory):
    config = write_config(
        directory,
        train={"max_steps": STEPS, "eval_every_steps": STEPS // 2},
        checkpoint={"every_steps": STEPS // 2},
        data={"sequence_length": 48, "validation_every": 25, "document_mask": True},
        hub={"push_to": "someone/tiny", "private": True},
    )
    command = ("--config", config, "--run_dir", directory / "run")
    with stand_in() as (address, repositories):
        output = launch(*command, program=PROGRAM, HF_ENDPOINT=address, HF_TOKEN=TOKEN)
        assert f"uploaded to {address}/someone/tiny" in output, output
    return directory / "run", output, repositories, command


@pytest.fixture(scope="module")
def run():
    """A run whose documents are masked, uploaded: (directory, what it printed, what the hub has, the command)."""
    return made_once(train_and_upload)


def evaluations(directory):
    return {row["step"]: row["eval_loss"] for row in rows(directory) if "eval_loss" in row}


@pytest.mark.slow
def test_the_held_out_loss_is_that_of_documents_one_by_one(run):
    directory = run[0]
    (tokens,) = (directory.parent / "cache").glob("*/index.json")
    held_out = TokenStream(tokens.parent, "validation", 48)
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    total, documents = 0.0, 0
    for i in range(len(held_out)):
        inputs, labels = (torch.from_numpy(array) for array in held_out.window(i))
        ends = (inputs == held_out.end_token_id).nonzero().flatten().add(1).tolist()
        for piece, wanted in zip(inputs.tensor_split(ends), labels.tensor_split(ends), strict=True):
            if len(piece):
                documents += 1
                logits = model(input_ids=piece[None]).logits[0].double()
                total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").nan_to_num().item()
    assert documents > len(held_out) + 5
    # The same sums in float32, in other batches: about 1e-7 relative for each token's loss.
    assert total / held_out.total_labels == pytest.approx(evaluations(directory)[STEPS], rel=1e-5)


def card(directory):
    """Return the metadata, the rows of the table, the code and the settings of a model card."""
    text = (directory / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    table = dict(re.findall(r"^\| (\w[^|]*) \| (.*) \|$", body, re.MULTILINE))
    code, settings = re.findall(r"```\w+\n(.*?)```", body, re.DOTALL)
    return yaml.safe_load(front), table, code, yaml.safe_load(settings)


@pytest.mark.slow
def test_the_exported_model_has_all_that_it_takes(run, monkeypatch):
    directory, output, repositories, _ = run
    model = directory / "model"
    front, table, code, settings = card(model)
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["stacey"]}
    assert table["data"] == "text.txt"
    assert table["trained on"] == f"{STEPS * 8} sequences of 48 tokens, in {STEPS} updates"
    assert f"eval_loss {evaluations(directory)[STEPS]:.4g}, eval_perplexity " in table["held out"]
    assert "stacey_dist 0." in table["versions"]
    assert settings["optimizer"]["name"] == "stacey"
    assert settings["data"]["document_mask"] is True
    # Nothing of the machine.
    assert str(directory.parent) not in (model / "README.md").read_text()
    assert not {"run_dir", "checkpoint", "hub"} & settings.keys()
    monkeypatch.chdir(directory)
    namespace = {}
    exec(code.replace("someone/tiny", "model"), namespace)
    assert type(namespace["model"]).__name__ == "LlamaForCausalLM"
    end = namespace["tokenizer"].eos_token_id
    assert GenerationConfig.from_pretrained(model).eos_token_id == end == namespace["model"].config.eos_token_id
    # What is on the hub is what is here.
    private, files = repositories["someone/tiny"]
    assert private
    assert files == {path.name: path.read_bytes() for path in model.iterdir() if path.name != MARKER}
    assert TOKEN not in output


@pytest.mark.slow
def test_a_checkpoint_is_exported_with_what_its_run_has(run, tmp_path, capsys):
    directory, _, _, _ = run
    checkpoint = directory / "checkpoints" / f"step_{STEPS // 2:08d}"
    assert main(["checkpoint", "export", str(checkpoint), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith(f"model for transformers: {tmp_path / 'out'}\n")
    _, table, code, _ = card(tmp_path / "out")
    assert f"eval_loss {evaluations(directory)[STEPS // 2]:.4g}, " in table["held out"]
    assert "AutoTokenizer" in code
    text = "The function returns a list </s>."
    ours, theirs = (
        AutoTokenizer.from_pretrained(d)(text)["input_ids"] for d in (tmp_path / "out", directory / "model")
    )
    assert ours == theirs
    # Away from its run it is a model still, and what it lacks is said.
    alone = shutil.copytree(checkpoint, tmp_path / "alone")
    assert main(["checkpoint", "export", str(alone), str(tmp_path / "bare")]) == 0
    assert "without a tokenizer or settings of images, which a checkpoint does not hold" in capsys.readouterr().out
    _, table, code, _ = card(tmp_path / "bare")
    assert table["held out"].startswith("not known: ")
    assert table["trained on"].endswith(f"in {STEPS // 2} updates")
    assert "Tokenizer" not in code


@pytest.mark.slow
def test_an_upload_that_fails_costs_a_line(run, tmp_path):
    directory = shutil.copytree(run[0], tmp_path / "run")
    output = launch(*run[3], "--run_dir", directory, program=PROGRAM, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN)
    line = next(line for line in output.splitlines() if line.startswith("hub.push_to: "))
    by_hand = f"hf upload someone/tiny {directory / 'model'} . --exclude {MARKER} --private"
    assert line.startswith("hub.push_to: not uploaded: ")
    assert line.endswith(f"; the model is complete in {directory / 'model'}; to upload it: {by_hand}")
    assert "model and tokenizer for transformers: " in output


def upload(directory, **settings):
    """Return what an upload of a directory to someone/tiny prints."""
    printed = []
    config = SimpleNamespace(hub=HubConfig(push_to="someone/tiny", **settings), train=SimpleNamespace(max_steps=1))
    push(SimpleNamespace(config=config, say=printed.append, call_on_main=lambda function: function()), directory)
    return "\n".join(printed)


def test_a_later_upload_replaces_the_weights_and_a_private_model_stays_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    (tmp_path / "README.md").write_text("A model.")
    with stand_in() as (address, repositories):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        assert upload(tmp_path) == f"uploaded to {address}/someone/tiny"
        (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
        assert upload(tmp_path) == f"uploaded to {address}/someone/tiny"
        private, files = repositories["someone/tiny"]
        assert not private
        assert files == {"model-00001-of-00001.safetensors": b"whole", "README.md": b"A model."}
        # The model is public now: what is to be private is not added to it.
        (tmp_path / "README.md").write_text("A secret.")
        output = upload(tmp_path, private=True)
        reason = f"{address}/someone/tiny is public, and hub.private is true"
        assert output == f"hub.push_to: not uploaded: {reason}; the model is complete in {tmp_path}"
        assert files["README.md"] == b"A model."


def test_what_can_be_checked_is_checked_at_the_start(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(SettingsError, match=r"hub.push_to: a/b needs a token of the hub; run `hf auth login`"):
        check_upload(HubConfig(push_to="a/b"))
    check_upload(HubConfig())
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    check_upload(HubConfig(push_to="a/b"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match=r"hub.push_to: a/b is not allowed with HF_HUB_OFFLINE"):
        check_upload(HubConfig(push_to="a/b"))
    for bad in ("a/b/c", "a b", "https://huggingface.co/a/b", "-a/b", ""):
        with pytest.raises(SettingsError, match=r"hub.push_to: .* is not allowed; it must be the name of a model"):
            LLM.parse(["--hub.push_to", bad])


def test_a_card_names_paths_by_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "before" / "model").mkdir(parents=True)
    given = {
        "model": {"pretrained": "runs/before/model", "config": "someone/tiny"},
        "data": {
            "files": ["clients/acme/*.jsonl", "/data/b.txt"],
            "validation_files": ["clients/held-out.txt"],
            "sources": [{"files": ["internal/c.txt"], "dataset": "someone/texts"}],
            "path": "photos/cats",
            "cache_dir": "tokens",
        },
        "tokenizer": {"file": "internal/x.model", "name": "someone/tokenizer"},
    }
    shown = _shown(given)
    assert shown["model"] == {"pretrained": "model", "config": "someone/tiny"}
    assert shown["tokenizer"] == {"file": "x.model", "name": "someone/tokenizer"}
    assert shown["data"] == {
        "files": ["*.jsonl", "b.txt"],
        "validation_files": ["held-out.txt"],
        "sources": [{"files": ["c.txt"], "dataset": "someone/texts"}],
        "path": "cats",
    }


def test_a_card_names_a_mixtures_sources_with_their_weights():
    config = LLMConfig()
    config.data.sources = [SourceConfig(files=["internal/c.txt", "d.txt"], weight=0.7), SourceConfig(dataset="a/texts")]
    assert _data(to_dict(config)["data"]) == "c.txt, d.txt, weight 0.7; a/texts, weight 1.0"
    assert _data(to_dict(LLMConfig())["data"]) == "what the launcher brings with it"
    assert _data({"sources": 7, "path": "photos/cats"}) == "cats"


def test_how_models_load(tmp_path):
    assert loader("LlamaForCausalLM") == loader("GPT2LMHeadModel") == "transformers.AutoModelForCausalLM"
    assert loader("ResNetForImageClassification") == "transformers.AutoModelForImageClassification"
    assert loader("LlamaForSequenceClassification") == "transformers.LlamaForSequenceClassification"
    assert describe_export("CifarResNet", tmp_path) == (
        f"model: {tmp_path}; it loads with stacey_dist.models.CifarResNet.from_pretrained"
    )
