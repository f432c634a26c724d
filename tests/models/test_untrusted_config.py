"""Models of configurations that others have written: nothing that they name is imported, asked about, or fetched."""

import builtins
import json
import socket
import sys
import types

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaConfig

from stacey_dist import Stacey
from stacey_dist.checkpoint import save_checkpoint
from stacey_dist.checkpoint.manifest import DamagedCheckpointError
from stacey_dist.cli import main
from stacey_dist.models.export import describe_model, export_model
from stacey_dist.models.untrusted_config import build_shell, model_class
from tests.checkpoint.foreign import make_zero1
from tests.test_docs import tiny_llama


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    """Fail at a question, a connection, or a kernel from a hub."""

    def refuse(*arguments, **_):
        pytest.fail(f"called with {arguments}")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = kernels.get_local_kernel = kernels.load_kernel = kernels.has_kernel = refuse
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and hasattr(module, "is_kernels_available"):
            monkeypatch.setattr(module, "is_kernels_available", lambda *_, **__: True)
    for name in ("transformers.integrations.hub_kernels", "transformers.modeling_utils"):
        for function in ("get_kernel", "load_and_register_attn_kernel", "lazy_load_kernel"):
            if hasattr(sys.modules.get(name), function):
                monkeypatch.setattr(sys.modules[name], function, refuse)


def write_model(directory, **changes):
    """Write a model directory with code beside it that makes a file when it is imported."""
    directory.mkdir()
    config = tiny_llama().config.to_dict() | changes
    (directory / "config.json").write_text(json.dumps(config))
    code = f"open({str(directory / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (directory / "code.py").write_text(code)
    return directory


CODE = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": CODE, "model_type": "theirs", "architectures": ["Theirs"]}, "'Theirs' is not a model of"),
        ({"auto_map": CODE, "model_type": "theirs", "architectures": None}, "'theirs' is not a model of"),
        ({"auto_map": CODE, "model_type": None, "architectures": []}, "None is not a model of"),
        ({"model_type": ["llama"], "architectures": [7]}, "7 is not a model of"),
        ({"model_type": "vit", "architectures": None}, "Unrecognized configuration class"),
        ({"depths": [10**9, 2]}, "depths: 1000000002 is more than 100000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is more than 100000"),
        ({"hidden_size": "many"}, ""),
        ({"hidden_size": 2**62}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"dtype": "load", "hidden_size": None}, ""),
        ({"__class__": "x"}, ""),
    ],
    ids=str,
)
def test_what_is_no_model_of_transformers_is_refused(tmp_path, capsys, changes, message):
    model = write_model(tmp_path / "model", **changes)
    assert main(["checkpoint", "import", str(tmp_path), str(tmp_path / "out"), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"stacey-dist: --model {model}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (model / "ran").exists()


NAMED = {
    "code": {"auto_map": CODE},
    "code for another model": {"auto_map": CODE, "architectures": None},
    "attention": {"attn_implementation": "kernels-community/flash-attn2"},
    "attention of others": {"_attn_implementation": "theirs/kernel"},
    "attention as kept": {"_attn_implementation_internal": "theirs/kernel:function"},
    "attention that is not here": {"attn_implementation": "flash_attention_2"},
    "experts": {"experts_implementation": "theirs/kernel", "_experts_implementation": "theirs/kernel"},
    "kernels": {"use_kernels": True, "kernel_config": {"RMSNorm": "theirs/kernel:RMSNorm"}},
    "quantizer": {"quantization_config": {"quant_method": "theirs", "modules_to_not_convert": ["lm_head"]}},
    "pipeline": {"custom_pipelines": {"text": {"impl": "code.Model", "pt": ["AutoModel"]}}},
    "another place": {"_name_or_path": "theirs/model", "name_or_path": "theirs/model"},
}


@pytest.mark.parametrize("name", NAMED)
def test_names_of_code_in_a_configuration_are_left_out(tmp_path, name):
    model = write_model(tmp_path / "model", **NAMED[name])
    shell = build_shell(json.loads((model / "config.json").read_text()))
    assert type(shell) is LlamaForCausalLM
    assert shell.config._attn_implementation in ("eager", "sdpa")
    assert {name: p.shape for name, p in shell.named_parameters()} == {
        name: p.shape for name, p in tiny_llama().named_parameters()
    }
    assert not (model / "ran").exists()


@pytest.mark.parametrize("name", NAMED)
def test_names_of_code_in_a_part_of_a_configuration_are_left_out(name):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 16} | sizes
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4} | sizes
    described = LlavaConfig(text_config=text, vision_config=vision).to_dict()
    for part in ("text_config", "vision_config"):
        described[part] |= NAMED[name]
    shell = build_shell(described, "LlavaForConditionalGeneration")
    for config in (shell.config, shell.config.text_config, shell.config.vision_config):
        assert config._attn_implementation in ("eager", "sdpa")
        assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("pretrained", [False, True])
def test_parts_of_a_model_are_not_fetched(pretrained):
    """Within a network there would be a connection."""
    described = {"backbone": "theirs/model", "use_pretrained_backbone": pretrained, "backbone_config": None}
    with pytest.raises(ValueError, match=r"."):
        build_shell(described, "DepthAnythingForDepthEstimation")


def test_an_import_names_the_parameters_of_such_a_model(tmp_path, capsys):
    make_zero1(tmp_path / "saved")
    model = write_model(tmp_path / "model", auto_map=CODE)
    command_line = ["checkpoint", "import", str(tmp_path / "saved"), str(tmp_path / "out"), "--model", str(model)]
    assert main(command_line) == 1
    assert "is a parameter of --model, but not in the files" in capsys.readouterr().err
    assert not (model / "ran").exists()


def test_a_path_that_is_not_there_is_not_looked_up_in_a_hub(tmp_path, capsys):
    assert main(["checkpoint", "import", str(tmp_path), str(tmp_path / "out"), "--model", "theirs/model"]) == 2
    assert "--model theirs/model: [Errno 2] No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "described",
    [
        7,
        [],
        {},
        {"class": "Linear", "config": {}},
        {"class": "PreTrainedModel", "config": {}},
        {"class": "AutoModel", "config": {}},
        {"class": "pipelines", "config": {}},
        {"class": "__name__", "config": {}},
        {"class": ["LlamaForCausalLM"], "config": {}},
        {"class": "LlamaForCausalLM"},
        {"class": "LlamaForCausalLM", "config": []},
        {"class": "LlamaForCausalLM", "config": {"hidden_size": "many"}},
        {"class": "LlamaForCausalLM", "config": {"num_hidden_layers": 10**7}},
    ],
    ids=str,
)
def test_a_checkpoint_that_says_it_is_of_no_model(tmp_path, described):
    model = torch.nn.Linear(2, 2)
    path = save_checkpoint(tmp_path / "step_00000001", model, Stacey(model.parameters()), {"model": described})
    with pytest.raises(DamagedCheckpointError, match="step_00000001: "):
        export_model(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMED)
def test_an_export_has_no_names_of_code(tmp_path, name):
    model = tiny_llama()
    described = describe_model(model)
    described["config"] |= NAMED[name]
    path = save_checkpoint(tmp_path / "step_00000001", model, Stacey(model.parameters()), {"model": described})
    export_model(path, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not written.keys() & (NAMED[name].keys() - {"architectures"})
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, model.lm_head.weight)


def test_models_are_those_of_transformers_alone(monkeypatch):
    import transformers

    class Theirs(LlamaForCausalLM):
        pass

    monkeypatch.setattr(transformers, "Theirs", Theirs, raising=False)
    assert model_class("Theirs") is None
    assert model_class("LlamaForCausalLM") is LlamaForCausalLM
    assert model_class("ResNetForImageClassification") is not None
