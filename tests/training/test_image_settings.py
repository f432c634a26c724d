"""Settings of train_imagenet.py: complete files, and every bad value refused."""

import dataclasses

import pytest
import yaml

from stacey_dist.errors import SettingsError
from stacey_dist.training.launchers import IMAGES
from stacey_dist.training.settings.command_line import flatten, parse, to_dict
from stacey_dist.training.settings.image_config import ImageConfig
from tests.training.forked import ROOT

CONFIGS = sorted((ROOT / "configs/imagenet").glob("*.yaml"))


def test_the_quickstart_file_is_the_defaults():
    path = ROOT / "configs/imagenet/quickstart.yaml"
    assert parse(ImageConfig, ["--config", str(path)]) == parse(ImageConfig, []) == ImageConfig()
    assert flatten(yaml.safe_load(path.read_text())).keys() == flatten(to_dict(ImageConfig())).keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_valid(path):
    config = IMAGES.parse(["--config", str(path)])
    assert path.stem in path.read_text().splitlines()[1], "the file's second line is the command that runs it"
    assert config.run_dir == ("runs/digits" if path.stem == "quickstart" else f"runs/{path.stem}")


# optimizer: p, lr, alpha, betas, weight decay, tau, as the paper's tables have them
PAPER = {
    "resnet50_2p": (2.2, 0.01, 0.01, (0.9, 0.99), 0.0005, 0.001),
    "resnet50_pp": (3, 0.01, 0.1, (0.9, 0.99), 0.0005, 0.001),
    "resnet50_p2": (2.8, 0.01, 0.01, (0.9, 0.99), 0.0005, 0.001),
    "cifar10_2p": (3.5, 0.02, 0.01, (0.9, 0.99), 0.4, 0.001),
    "cifar10_pp": (2, 0.1, 0.1, (0.9, 0.99), 0.01, 0.001),
    "cifar10_p2": (2, 0.1, 0.1, (0.9, 0.99), 0.01, 0.001),
}
BASELINES = {
    "resnet50_sgd": ("sgd", 0.01, 0.0005),
    "cifar10_sgd": ("sgd", 0.02, 0.0002),
    "cifar10_adam": ("adam", 0.001, 0.0005),
    "cifar10_adamw": ("adamw", 0.01, 0.0005),
    "cifar10_lion": ("lion", 0.001, 0.01),
}


def test_the_papers_hyper_parameters():
    loaded = {p.stem: parse(ImageConfig, ["--config", str(p)]) for p in CONFIGS if p.stem != "quickstart"}
    assert loaded.keys() == PAPER.keys() | BASELINES.keys()
    for name, values in PAPER.items():
        o = loaded[name].optimizer
        assert (o.name, o.variant) == ("stacey", name.split("_")[1])
        assert (o.p, o.lr, o.alpha, o.betas, o.weight_decay, o.tau) == values
        assert (o.state_dtype, o.eps) == ("bfloat16", 1e-8)
    for name, values in BASELINES.items():
        o = loaded[name].optimizer
        assert (o.name, o.lr, o.weight_decay) == values
    for name, config in loaded.items():
        # They differ in the optimizer alone, so that runs can be compared.
        other = loaded[name.split("_")[0] + "_p2"]
        assert dataclasses.replace(config, optimizer=other.optimizer, run_dir=other.run_dir) == other
    imagenet, cifar = loaded["resnet50_p2"], loaded["cifar10_p2"]
    assert (imagenet.train.global_batch_size, imagenet.train.epochs, imagenet.schedule.warmup_steps) == (256, 90, 10000)
    assert (imagenet.model.depth, imagenet.data.crop, imagenet.data.flip) == (50, "random_resized", True)
    assert (cifar.train.global_batch_size, cifar.train.epochs, cifar.model.depth) == (128, 200, 18)
    assert (cifar.data.crop, cifar.data.flip, cifar.model.stem) == ("padded", True, "cifar")


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(ImageConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in flatten(to_dict(ImageConfig())):
        entry, found, _ = text[text.index(f" --{name} ") :][:900].partition("(type:")
        assert found, name
        words = [word for word in entry.split() if not word.startswith(("--", "["))]
        assert len(words) >= 4, f"{name} is not explained: {entry}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model.width 0", "model.width: 0 is not allowed; it must be > 0"),
        ("--data.min_scale 1.5", "data.min_scale: 1.5 is not allowed; it must be within (0, 1]"),
        (
            "--data.cache resized --data.image_size 384 --data.eval_resize 438",
            "data.cache_resize: 256 is not allowed; images of the cache would be enlarged; it must be at least 438",
        ),
        ("--data.crop random_resized", "data.eval_resize: None is not allowed; data.crop random_resized needs it"),
        ("--data.workers -1", "data.workers: -1 is not allowed; it must be >= 0"),
        ("--data.path x --data.dataset y", "data.dataset: y is not allowed; give either data.path or data.dataset"),
        ("--train.label_smoothing 1", "train.label_smoothing: 1.0 is not allowed; it must be within [0, 1)"),
        ("--train.epochs 0", "train.epochs: 0.0 is not allowed; it must be finite and > 0"),
        ("--train.epochs inf", "train.epochs: inf is not allowed; it must be finite"),
        ("--checkpoint.allow_changes model.hidden_size", "checkpoint.allow_changes: model.hidden_size"),
        ("--optimizer.lr -1", "optimizer.lr: -1.0 is not allowed"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(SettingsError) as error:
        IMAGES.parse(options.split())
    assert message in str(error.value)


def test_another_launchers_setting_is_unknown(capsys):
    with pytest.raises(SystemExit):
        parse(ImageConfig, ["--model.hidden_size", "64"])
    assert "unknown option --model.hidden_size" in capsys.readouterr().err
