"""An export is of the model that the checkpoint says it is of."""

import json

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.checkpoint import save_checkpoint
from stacey_dist.cli import main
from stacey_dist.errors import SettingsError
from stacey_dist.models.export import describe_model, export_model
from tests.test_docs import tiny_llama


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = tiny_llama()


def resized(model):
    model.resize_token_embeddings(model.config.vocab_size + 8)
    return model


def headed(model):
    model.head = torch.nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: Wrapped(), r"model\.embed_tokens\.weight is absent in the checkpoint, but \(.*\) in Llama"),
        (resized, r"weight is \(.*\) in the checkpoint, but \(.*\) in LlamaForCausalLM"),
        (headed, r"head\.\w+ is \(.*\) in the checkpoint, but absent in LlamaForCausalLM"),
    ],
)
def test_another_model_than_was_described(tmp_path, change, message):
    model = tiny_llama()
    described = describe_model(model)
    saved = change(model)
    path = save_checkpoint(tmp_path / "step_00000001", saved, Stacey(saved.parameters()), {"model": described})
    with pytest.raises(SettingsError, match=message):
        export_model(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_finite_are_exported_with_a_warning(tmp_path, capsys):
    model = tiny_llama()
    extra = {"model": describe_model(model)}
    good = save_checkpoint(tmp_path / "good", model, Stacey(model.parameters()), extra)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    ruined = save_checkpoint(tmp_path / "ruined", model, Stacey(model.parameters()), extra)
    for path, warning in ((good, ""), (ruined, f"warning: {ruined}, with weights or optimizer states that are not f")):
        assert main(["checkpoint", "export", str(path), f"{path}-model"]) == 0
        said = capsys.readouterr().err
        assert ("not finite" in said) == bool(warning)
        assert warning in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_it_loads_in_the_dtype_of_its_weights(tmp_path, dtype, tied):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    extra = {"model": describe_model(model)}
    path = save_checkpoint(tmp_path / "step_00000001", model, Stacey(model.parameters()), extra)
    export_model(path, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", torch_dtype="auto")
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
