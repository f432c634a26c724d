"""Settings of Accelerate and DeepSpeed that are not allowed: one line with the setting, its value and what is."""

import os

import pytest

from stacey_dist.errors import SettingsError
from stacey_dist.training.processes import deepspeed_config, launch_settings
from stacey_dist.training.settings.config import RunConfig
from stacey_dist.training.settings.image_config import ImageConfig
from stacey_dist.training.settings.llm_config import LLMConfig
from tests.training.helpers import launch, write_config

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAYERS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaMLP,GPT2Block"}

# (environment as Accelerate sets it, what the user reads)
REFUSED = [
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision: fp8 is not allowed; it must be no or bf16 or fp16"),
    (
        FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"},
        "fsdp_auto_wrap_policy: SIZE_BASED_WRAP is not allowed; it must be TRANSFORMER_BASED_WRAP or NO_WRAP",
    ),
    (FSDP | {"FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}, "fsdp_state_dict_type: LOCAL_STATE_DICT is not allowed"),
    (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "fsdp_reshard_after_forward: FULL_SHARD is not allowed"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "megatron_lm_config: Megatron-LM is not allowed; leave it out"),
    ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size: 2 is not allowed; it must be 1"),
]


@pytest.mark.parametrize(("variables", "message"), REFUSED, ids=[case[1].split(":")[0] for case in REFUSED])
def test_settings_of_accelerate(variables, message, monkeypatch):
    launch_settings.check_environment()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        launch_settings.check_environment()
    assert str(error.value).startswith(message)
    assert "It is set by" in str(error.value)
    assert "\n" not in str(error.value)


# (text of DeepSpeed's file, what the user reads)
FILES = [
    (
        '{\n\t"zero_optimization": {"stage": 2},\n\t"zero_optimization": {"stage": 3}\n}',
        "given twice, in line 2 and in",
    ),
    ('{"zero_optimization": {"stage": 2, "stage": 2}}', "stage is given twice"),
    ('{"zero_optimization": {"stage": NaN}}', "NaN is not a number"),
    ('{"gradient_clipping": 1' + "0" * 5000 + "}", "a number of 5001 digits is not allowed"),
    ("[" * 5000, "nested more than 100 deep"),
    ("zero_optimization: {stage: 2}", "is not valid JSON"),
    ("[]", "it must hold settings"),
    ('{"zero_optimization": {"stage": 2}, "fp16": null}', "fp16: None is not allowed; it must hold settings"),
    ('{"zero_optimization": 2}', "zero_optimization: 2 is not allowed; it must hold settings"),
    (
        '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
        "zero_optimization.offload_optimizer: cpu is not allowed; it must hold settings",
    ),
    ("", "is not valid JSON"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[case[1] for case in FILES])
def test_files_of_deepspeed(text, message, tmp_path, monkeypatch):
    path = tmp_path / "deepspeed.json"
    path.write_text(text)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(SettingsError) as error:
        deepspeed_config.check_file()
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", deepspeed_config._UNSUPPORTED)
def test_what_deepspeed_may_not_do(name):
    *sections, last = name.split(".")
    for value in (True, {"enabled": True}, {"topk_ratio": 0.1}):
        config = {"zero_optimization": {"stage": 2}}
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
        with pytest.raises(SettingsError, match=rf"{name}: .* in the DeepSpeed configuration is not allowed"):
            deepspeed_config._check_supported(config)
        inner[last] = {"enabled": False} if isinstance(value, dict) else False
        deepspeed_config._check_supported(config)


@pytest.mark.parametrize("name", deepspeed_config._NEEDED)
def test_what_deepspeed_must_do(name):
    section, last = name.split(".")
    deepspeed_config._check_supported({section: {last: True}})
    with pytest.raises(SettingsError, match=rf"{name}: False in the DeepSpeed configuration is not allowed"):
        deepspeed_config._check_supported({section: {last: False}})


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_where_deepspeed_may_not_offload_to(section):
    for allowed in (None, {}, {"device": "cpu"}, {"device": "none"}):
        deepspeed_config._check_supported({"zero_optimization": {"stage": 3, section: allowed}})
    config = {"zero_optimization": {"stage": 3, section: {"device": "nvme", "nvme_path": "/local"}}}
    with pytest.raises(SettingsError, match=rf"zero_optimization\.{section}\.device: nvme .* must be cpu or none"):
        deepspeed_config._check_supported(config)


def test_what_deepspeed_has_another_place_for():
    harmless = {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}}
    deepspeed_config._check_supported(harmless)
    for name, instead in deepspeed_config._INSTEAD.items():
        with pytest.raises(SettingsError, match=rf"{name}: .*; {instead}"):
            deepspeed_config._check_supported({name: {"some": 1}})


# (a section of DeepSpeed's configuration, what the user reads)
OF_DEEPSPEED = [
    ({"zero_optimization": {"stage": 7}}, "stage: 7: "),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "lots"}}, "reduce_bucket_size: lots: "),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "moon"}}}, "moon"),
    ({"zero_optimization": {"stage": 3, "no_such_setting": 1}}, "no_such_setting"),
    ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": "perhaps"}}, "perhaps"),
    ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bfloat16"),
]


@pytest.mark.parametrize(("sections", "message"), OF_DEEPSPEED, ids=[case[1] for case in OF_DEEPSPEED])
def test_what_deepspeed_refuses(sections, message, monkeypatch):
    config = {"train_batch_size": 8, "steps_per_print": float("inf"), "gradient_clipping": "auto", **sections}
    with pytest.raises(SettingsError) as error:
        deepspeed_config.check_with_deepspeed(config)
    assert str(error.value).startswith("the DeepSpeed configuration is not allowed: ")
    assert message in str(error.value)
    assert "STACEY_DIST_TRACEBACK=1" in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("STACEY_DIST_TRACEBACK", "1")
    with pytest.raises(Exception, match=r".") as whole:
        deepspeed_config.check_with_deepspeed(config)
    assert not isinstance(whole.value, SettingsError)


def test_a_good_configuration_of_deepspeed():
    deepspeed_config.check_with_deepspeed(
        {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
    )


@pytest.mark.parametrize("config", [LLMConfig(), ImageConfig()], ids=["llm", "imagenet"])
def test_layer_classes_are_those_of_the_model(config, monkeypatch):
    for name, value in LAYERS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        SettingsError, match=r"fsdp_transformer_layer_cls_to_wrap: .* is not allowed; the model has .*Conv|Llama"
    ):
        launch_settings.check_layer_classes(config.layer_classes)
    known = {"LlamaDecoderLayer", "LlamaMLP"} if isinstance(config, LLMConfig) else {"ResNetStage", "BatchNorm"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(known))
    launch_settings.check_layer_classes(config.layer_classes)
    launch_settings.check_layer_classes(RunConfig().layer_classes)  # Accelerate looks for them in a program's own model


@pytest.mark.slow
def test_a_launcher_says_it_before_it_prepares_data(tmp_path):
    config = write_config(tmp_path)
    arguments = ("--config", config, "--run_dir", tmp_path / "run")
    output = launch(*arguments, processes=2, engine="cpu_fsdp2", expect=2, **LAYERS)
    assert "train_llm.py: error: fsdp_transformer_layer_cls_to_wrap: GPT2Block is not allowed; the model has " in output
    assert "Traceback" not in output
    assert "tokenizing" not in output


def test_the_files_of_the_launch_are_named(monkeypatch):
    class Parent:
        def __init__(self, pid):
            assert pid == os.getppid()

        def cmdline(self):
            return ["python", "accelerate", "launch", "--config_file", "my.yaml", "train_llm.py"]

    monkeypatch.setattr(launch_settings.psutil, "Process", Parent)
    assert launch_settings._source() == "my.yaml"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")
    assert launch_settings._source() == "my.yaml and ds.json"
