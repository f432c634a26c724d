"""Settings: from files and options, complete, and every bad one refused with a line that says what to do."""

import dataclasses
import gzip
import inspect
import math
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import yaml

from stacey_dist import Stacey, yaml_files
from stacey_dist.errors import SettingsError
from stacey_dist.training.launchers import LLM
from stacey_dist.training.processes.failures import user_errors
from stacey_dist.training.settings.command_line import flatten, parse, to_dict
from stacey_dist.training.settings.config import RunConfig
from stacey_dist.training.settings.llm_config import CorpusConfig, LLMConfig
from tests.training.forked import ROOT
from tests.training.helpers import launch, write_text

CONFIGS = sorted((ROOT / "configs/llm").glob("*.yaml"))


def test_the_quickstart_file_is_the_defaults():
    from_file = parse(LLMConfig, ["--config", str(ROOT / "configs/llm/quickstart.yaml")])
    assert from_file == parse(LLMConfig, []) == LLMConfig()
    written = yaml.safe_load((ROOT / "configs/llm/quickstart.yaml").read_text())
    named = flatten(written).keys()
    missing = flatten(to_dict(LLMConfig())).keys() - named
    # what another choice would need is left out there
    assert not {name for name in missing if name.split(".")[0] in ("train", "schedule", "checkpoint")}


def test_the_class_differs_from_the_launchers_in_the_tuned_settings_alone():
    launcher = dataclasses.asdict(LLMConfig().optimizer)
    in_class = {name: p.default for name, p in inspect.signature(Stacey).parameters.items()}
    in_class["state_dtype"] = str(in_class["state_dtype"]).removeprefix("torch.")
    tuned = {"lr", "p", "alpha", "tau", "betas", "weight_decay"}
    for name in launcher.keys() & in_class.keys():
        assert (in_class[name] != launcher[name]) == (name in tuned), name
    assert {"variant", "eps", "z_init", "state_dtype", "rounding"} | tuned == launcher.keys() & in_class.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_valid(path):
    config = LLM.parse(["--config", str(path)])
    assert path.stem in path.read_text().splitlines()[1], "the file's second line is the command that runs it"
    assert config.run_dir == f"runs/{path.stem}"


def test_there_is_one_config_for_each_variant_and_baseline():
    loaded = {p.stem: parse(LLMConfig, ["--config", str(p)]) for p in CONFIGS}
    c4 = {name: c for name, c in loaded.items() if name.startswith("llama_100m_c4_") and name.endswith("_paper")}
    methods = {(c.optimizer.name, c.optimizer.variant) for c in c4.values() if c.optimizer.name == "stacey"}
    assert methods == {("stacey", v) for v in ("p2", "pp", "2p")}
    assert {c.optimizer.name for c in c4.values()} == {"stacey", "lp_descent", "adamw", "adam", "lion", "sgd"}
    # they differ in the optimizer alone, so that runs can be compared
    first, *others = c4.values()
    for config in others:
        assert dataclasses.replace(config, optimizer=first.optimizer, run_dir=first.run_dir) == first


def test_options_win_over_files_and_later_files_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {max_steps: 7, eval_every_steps: 3}\noptimizer: {p: .inf}\n")
    (tmp_path / "b.yaml").write_text("train: {max_steps: 9}\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    config = parse(LLMConfig, ["--config", a, "--config", b, "--train.eval_every_steps=5"])
    assert (config.train.max_steps, config.train.eval_every_steps) == (9, 5)
    assert config.optimizer.p == math.inf


def test_max_steps_that_is_given_later_takes_the_place_of_epochs(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {max_steps: 70, epochs: 2}\n")  # as a run's config.yaml has both
    (tmp_path / "b.yaml").write_text("train: {max_steps: 90}\n")
    a, b = (["--config", str(tmp_path / name)] for name in ("a.yaml", "b.yaml"))
    steps, epochs = ["--train.max_steps", "100"], ["--train.epochs", "3"]
    found = [(*a, *steps), (*a, *b), (*b, *a), a, (*a, *epochs), (*epochs, *a), (*epochs, *steps), (*steps, *epochs)]
    trains = [parse(LLMConfig, options).train for options in found]
    assert [train.epochs for train in trains] == [None, None, 2, 2, 3, 3, None, 3]
    assert [train.max_steps for train in trains] == [100, 90, 70, 70, 70, 70, 100, 100]


def test_of_a_nodes_processes_the_first_tells_of_a_bad_option(monkeypatch, capsys):
    for rank, lines in (("0", 2), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        for options in (["--no.such", "1"], ["--train.micro_batch_size", "3"]):
            with pytest.raises(SystemExit) as ended, user_errors("train_llm.py"):
                LLM.parse(options)
            assert ended.value.code == 2
            assert len(capsys.readouterr().err.splitlines()) == (lines if options[0] == "--no.such" else lines // 2)


def test_options_as_people_type_them():
    config = parse(
        LLMConfig,
        ["--data.files", "*.json.gz", "--optimizer.p", "inf", "--optimizer.betas", "0.9,0.95", "--optimizer.eps",
         "1e-8", "--tracking.trackers=wandb,tensorboard", "--train.micro_batch_size", "null"],
    )  # fmt: skip
    assert config.data.files == ["*.json.gz"]
    assert config.optimizer.p == math.inf
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.eps == 1e-8
    assert config.tracking.trackers == ["wandb", "tensorboard"]
    assert config.train.micro_batch_size is None
    assert parse(LLMConfig, ["--data.files", "[a.txt, b.txt]"]).data.files == ["a.txt", "b.txt"]
    assert parse(LLMConfig, ["--data.files", "[0-9].txt,[ab].txt"]).data.files == ["[0-9].txt", "[ab].txt"]
    for typed, profile in (("3,5", (3, 5)), ("[3, 5]", (3, 5)), ("2, 1_000", (2, 1000)), ("null", None)):
        assert parse(LLMConfig, ["--train.profile", typed]).train.profile == profile
    # the shell has replaced a pattern
    shell = parse(LLMConfig, ["--data.files", "a,1.txt", "b.txt", "--seed", "3", "--optimizer.betas", "0.8", "0.9"])
    assert (shell.data.files, shell.seed, shell.optimizer.betas) == (["a,1.txt", "b.txt"], 3, (0.8, 0.9))
    assert parse(LLMConfig, ["--train.profile", "3", "5"]).train.profile == (3, 5)
    # and a variable that is not set, by nothing
    assert parse(LLMConfig, ["--model.config", "", "--model.pretrained", ""]).model.source is None


@dataclasses.dataclass
class Mixed:
    """Settings of a program that may be text beside something else."""

    auto: int | Literal[0, "auto"] = 0
    flag: Literal[True, False] = True
    pair: tuple[int, int] | list[str] | None = None
    tag: bool | str | int = ""
    share: Literal[1.0, 2.5] = 2.5


@dataclasses.dataclass
class MixedConfig(RunConfig):
    """A program's own settings."""

    mixed: Mixed = dataclasses.field(default_factory=Mixed)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("auto", "auto", "auto"),
        ("auto", "3", 3),
        ("flag", "no", False),
        ("pair", "[a, b]", ["a", "b"]),
        ("pair", "3, 4", (3, 4)),
        ("pair", "null", None),
        ("tag", "2024_01", "2024_01"),
        ("share", "1", 1),
    ],
)
def test_text_beside_something_else(tmp_path, name, text, value):
    config = parse(MixedConfig, [f"--mixed.{name}", text])
    assert getattr(config.mixed, name) == value
    config.validate()
    (tmp_path / "a.yaml").write_text(yaml_files.dump(to_dict(config)))
    assert parse(MixedConfig, ["--config", str(tmp_path / "a.yaml")]) == config


@pytest.mark.parametrize(("text", "value"), [("1_000.5", 1000.5), ("1_0e-3", 0.01), ("-1_000", -1000)])
def test_grouped_digits(text, value):
    assert parse(LLMConfig, ["--model.rope_theta", text]).model.rope_theta == value


def test_a_setting_that_is_a_truth_or_a_word(tmp_path):
    (tmp_path / "words.yaml").write_text("train: {gradient_checkpointing: selective}\n")
    for text, value in (("true", True), ("no", False), ("selective", "selective")):
        options = ["--train.gradient_checkpointing", text]
        assert parse(LLMConfig, options).train.gradient_checkpointing is value or value == "selective"
        (tmp_path / "a.yaml").write_text(f"train: {{gradient_checkpointing: {text}}}\n")
        from_file = parse(LLMConfig, ["--config", str(tmp_path / "a.yaml")]).train.gradient_checkpointing
        assert from_file == value
        assert type(from_file) is type(value)


def test_a_file_takes_a_text_where_an_option_does(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "data: {files: 'a.txt,b.txt'}\noptimizer: {p: inf, betas: '0.9,0.95'}\ntracking: {trackers: wandb}\n"
    )
    options = [
        "--data.files=a.txt,b.txt",
        "--optimizer.p=inf",
        "--optimizer.betas=0.9,0.95",
        "--tracking.trackers=wandb",
    ]
    assert parse(LLMConfig, ["--config", str(path)]) == parse(LLMConfig, options)


def test_the_resolved_config_comes_back_the_same(tmp_path):
    sources = "[{files: [x.txt], weight: 0.1}, {dataset: a/b-c, name: d}]"
    config = parse(LLMConfig, ["--optimizer.p", "inf", "--data.sources", sources, "--optimizer.betas", "0.8,0.9"])
    assert [(source.label, source.weight) for source in config.data.sources] == [("x", 0.1), ("d", 1.0)]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert parse(LLMConfig, ["--config", str(tmp_path / "config.yaml")]) == config


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(LLMConfig, ["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in flatten(to_dict(LLMConfig())):
        start = text.index(f" --{name} ")
        entry, found, _ = text[start : start + 700].partition("(type:")
        assert found, name
        assert "default:" in text[start : start + 900], name
        words = [word for word in entry.split() if not word.startswith(("--", "["))]
        assert len(words) >= 4, f"{name} is not explained: {entry}"


# (options, what the user reads)
MISTYPED = [
    (["--optimizer.lrr", "3"], "unknown option --optimizer.lrr; did you mean --optimizer.lr?"),
    (["--lr", "3"], "unknown option --lr; did you mean --optimizer.lr?"),
    (["--train.max_step", "3"], "did you mean --train.max_steps?"),
    (["--model.seed", "3"], "did you mean --seed?"),
    (["--rundir=x"], "did you mean --run_dir?"),
    (["--optimizer.learning_rate", "3"], "did you mean --optimizer.lr?"),
    (["--train.batch_size", "3"], "did you mean --train.global_batch_size?"),
    (["--tokenizer.file", "a b.model", "c"], "--tokenizer.file: it takes one value, and got 'a b.model' c; put quotes"),
    (["--seed", "--train.max_steps", "3"], "--seed: a value is missing"),
    (["a.txt"], "a.txt: an option, as in --section.name value, must come before it"),
    (["--optimizer.lr", "fast"], "optimizer.lr: fast is not allowed; it must be a number"),
    (["--optimizer.lr", "12:30:45"], "optimizer.lr: 12:30:45 is not allowed; it must be a number"),
    (["--train.max_steps", "1__000"], "train.max_steps: 1__000 is not allowed; it must be a whole number"),
    (["--train.max_steps", f"1_{5000 * '0'}"], "a number of 5001 digits is not allowed"),
    (["--train.max_steps", "\u0660_\u0661"], "it must be a whole number"),
    (["--optimizer.betas", "0.9,0b1"], "optimizer.betas: 0b1 is not allowed; it must be a number"),
    (["--train.max_steps", "2.5"], "train.max_steps: 2.5 is not allowed; it must be a whole number"),
    (
        ["--optimizer.name", "adamax"],
        "optimizer.name: adamax is not allowed; it must be one of stacey, lp_descent",
    ),
    (["--data.on_bad_record", "ignore"], "data.on_bad_record: ignore is not allowed; it must be one of error, skip"),
    (["--train.mixed_precision", "fp8"], "fp8 is not allowed; it must be one of no, bf16, fp16, or null"),
    (
        ["--optimizer.betas", "0.9"],
        "optimizer.betas: [0.9] is not allowed; it must be 2 values, each a number",
    ),
    (["--train.profile", "9"], "train.profile: [9] is not allowed; it must be 2 values, each a whole number, or null"),
    (["--tracking.trackers", "mlflow"], "it must be a list, each one of wandb, tensorboard"),
    (
        ["--model.attention", "flash"],
        "model.attention: flash is not allowed; it must be one of sdpa, flash_attention_2",
    ),
    (
        ["--train.gradient_checkpointing", "some"],
        "train.gradient_checkpointing: some is not allowed; it must be true or false or selective",
    ),
    (["--train.compile", "maybe"], "train.compile: maybe is not allowed; it must be true or false"),
    (["--config", "missing.yaml"], "--config missing.yaml: cannot be read"),
    (["--data.sources", "[{weight: x}]"], "error: data.sources[0].weight: x is not allowed; it must be a number"),
    (["--data.sources", "[{}, {wieght: 1}]"], "data.sources[1]: unknown setting wieght; did you mean weight?"),
    (["--data.sources", "[{files: a.txt}]"], "data.sources[0].files: a.txt is not allowed; it must be a list"),
    (["--data.sources", "a.txt"], "data.sources[0]: a.txt is not allowed; it must be settings: files, validation"),
]


@pytest.mark.parametrize(("options", "message"), MISTYPED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistyped_options(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(LLMConfig, options)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 2


FILES = [
    ("optimzer: {lr: 1}", "unknown setting optimzer.lr; did you mean optimizer.lr?"),
    ("train: {steps: 1}", "unknown setting train.steps"),
    ("train: 5", "train must hold settings, not 5"),
    ("optimizer: {betas: '0.9'}", "optimizer.betas: [0.9] is not allowed; it must be 2 values, each a number"),
    ("a: [1", "is not valid YAML"),
    ("- 1", "must hold settings"),
    ("checkpoint: {keep_last: }", "checkpoint.keep_last: null is not allowed; it must be a whole number"),
    ("optimizer: {betas: null}", "optimizer.betas: null is not allowed; it must be 2 values, each a number"),
    ("seed:", "seed: null is not allowed; it must be a whole number"),
    (
        "train: {mixed_precision: false}",
        "train.mixed_precision: false is not allowed; it must be one of no, bf16",
    ),
    ("model: {depth: 18}", "unknown setting model.depth; it is one of train_imagenet.py"),
    ("", "must hold settings"),
    ("data: {sources: 3}", "data.sources: 3 is not allowed; it must be a list, each settings: files, "),
    ("data: {sources: {}}", "data.sources: {} is not allowed; it must be a list, each settings: files, "),
    ("seed: {}", "seed: {} is not allowed; it must be a whole number"),
    ("data.files: {}", "data.files: {} is not allowed; it must be a list, each text"),
    ("nonsense: {}", "unknown setting nonsense"),
    ("data: {files: {}}", "data.files: {} is not allowed; it must be a list, each text"),
    ("data: {sources: [{weight: null}]}", "data.sources[0].weight: null is not allowed; it must be a number"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_mistyped_files(content, message, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit):
        LLM.parse(["--config", str(path)])
    error = capsys.readouterr().err
    assert f"--config {path}" in error
    assert message in error


def test_null_and_false_where_they_are_allowed(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text("checkpoint: {keep_every: null}\ntrain: {mixed_precision: null, compile: No}\ndata: {files: []}\n")
    assert parse(LLMConfig, ["--config", str(path)]) == LLMConfig()


OUT_OF_RANGE = [
    ("--optimizer.lr -1", "optimizer.lr: -1.0 is not allowed; it must be a finite number >= 0"),
    ("--optimizer.p 1.5", "optimizer.p: 1.5 is not allowed; it must be a number >= 2, or inf"),
    ("--optimizer.p inf --optimizer.variant pp", "optimizer.p: inf is not allowed; it must be finite for"),
    ("--optimizer.p 2000 --optimizer.variant 2p", "optimizer.p: 2000.0 is not allowed; it must be at most 1000 for"),
    ("--optimizer.name lion --optimizer.lr 0", "optimizer.lr: 0.0 is not allowed; lion needs it > 0"),
    ("--model.dtype bfloat16 --train.mixed_precision fp16", "train.mixed_precision: fp16 is not allowed; it needs"),
    ("--optimizer.tau 2", "optimizer.tau: 2.0"),
    ("--optimizer.betas 0.9,1.0", "optimizer.betas: [0.9, 1.0]"),
    ("--optimizer.momentum 1", "optimizer.momentum: 1.0"),
    ("--optimizer.eps=-1e-8", "optimizer.eps: -1e-08"),
    ("--optimizer.name adamw --model.dtype bfloat16", "model.dtype: bfloat16"),
    ("--schedule.warmup_steps 1.5", "schedule.warmup_steps: 1.5 is not allowed; it must be a whole number of"),
    ("--schedule.warmup_steps -1", "schedule.warmup_steps: -1 is not allowed; it must be a whole number of updates"),
    ("--schedule.name wsd --schedule.decay_steps 590", "schedule.decay_steps: 590 is not allowed; it must be at most"),
    ("--schedule.name wsd --schedule.decay_steps=-.1", "schedule.decay_steps: -0.1"),
    ("--optimizer.name muon --optimizer.adamw_lr -1", "optimizer.adamw_lr: -1.0 is not allowed; it must be a finite"),
    ("--optimizer.name muon --model.dtype bfloat16", "optimizer.name = muon rounds bfloat16 weights to nearest"),
    ("--schedule.warmup_steps 700", "schedule.warmup_steps: 700 is not allowed; it must be at most train.max_steps"),
    ("--schedule.min_lr_ratio 1.5", "schedule.min_lr_ratio: 1.5"),
    ("--train.max_steps 0", "train.max_steps: 0 is not allowed; it must be > 0"),
    ("--train.collective_timeout_seconds .inf", "train.collective_timeout_seconds: inf is not allowed; it must be fin"),
    ("--train.global_batch_size 0", "train.global_batch_size: 0"),
    ("--train.micro_batch_size 5", "train.micro_batch_size: 5 is not allowed; it must divide train.global_batch_size"),
    ("--train.max_grad_norm -1", "train.max_grad_norm: -1.0"),
    ("--train.eval_every_steps 0", "train.eval_every_steps: 0"),
    ("--train.profile 9,8", "train.profile: [9, 8] is not allowed; its first update must not be after its last one"),
    ("--train.profile 0,8", "train.profile: [0, 8] is not allowed; each must be > 0"),
    ("--tracking.histogram_every 0", "tracking.histogram_every: 0 is not allowed; it must be > 0"),
    ("--tracking.sample_tokens=-1", "tracking.sample_tokens: -1 is not allowed; it must be >= 0"),
    ("--checkpoint.keep_last 0", "checkpoint.keep_last: 0"),
    ("--model.num_attention_heads 3", "model.num_attention_heads: 3 is not allowed; it must divide model.hidden_size"),
    ("--model.hidden_size 12", "must be even, for rotary embeddings"),
    ("--model.num_key_value_heads 3", "model.num_key_value_heads: 3"),
    ("--model.max_position_embeddings 64", "model.max_position_embeddings: 64 is not allowed; it must be"),
    ("--model.config a.json --model.hidden_size 64", "model.hidden_size: 64 is not allowed; model.config = a.json has"),
    ("--model.pretrained a --model.max_position_embeddings 64", "max_position_embeddings: 64 is not allowed; model.pr"),
    ("--model.config a --model.pretrained b", "model.config: a is not allowed; give it or model.pretrained, not both"),
    ("--model.config a --model.embeddings new", "model.embeddings: new is not allowed; it goes with model.pretrained"),
    ("--model.pretrained a --model.embeddings keep", "model.embeddings: keep is not allowed; it goes with tokenizer.n"),
    ("--model.pretrained a --tokenizer.name b", "tokenizer.name: b is not allowed; say what becomes of the embeddings"),
    ("--model.pretrained a --tokenizer.file b", "tokenizer.file: b is not allowed; say what becomes of the embeddings"),
    ("--model.config=~/a.json", "model.config: ~/a.json is not allowed; it must be a path; a leading ~"),
    ("--data.validation_every 1", "data.validation_every: 1"),
    ("--data.sequence_length 0", "data.sequence_length: 0"),
    ("--data.files a.txt --data.dataset c4", "data.dataset: c4 is not allowed; give either data.files or data.dataset"),
    ("--data.validation_files a.txt", "data.validation_files"),
    ("--tokenizer.name t5-base --tokenizer.file a.model", "tokenizer.file"),
    ("--hub.push_to a/b/c", "hub.push_to: a/b/c is not allowed; it must be the name of a model repository"),
    ("--seed -1", "seed: -1"),
    ("--seed 4294967296", "seed: 4294967296 is not allowed; it must be within [0, 4294967295]"),
    ("--run_dir=~/run", "run_dir: ~/run is not allowed; it must be a path; a leading ~"),
    ("--data.cache_dir=~/cache", "data.cache_dir: ~/cache is not allowed; it must be a path; a leading ~"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE)
def test_values_out_of_range(options, message):
    with pytest.raises(SettingsError) as error:
        LLM.parse(options.split())
    assert message in str(error.value)


BAD_SOURCES = [
    ("{files: [a.txt]}, {weight: 2}", "data.sources[1].files: [] is not allowed; give it, or data.sources[1].dataset"),
    ("{files: [a.txt], weight: 0}", "data.sources[0].weight: 0.0 is not allowed; it must be finite and > 0"),
    ("{files: [a]}, {files: [b], weight: 1e-7}", "data.sources[1].weight: 1e-07 is not allowed; it must be at least"),
    ("{files: [x/a.txt]}, {files: [a.gz]}", "data.sources[1].name: a is not allowed; data.sources[0] has that name"),
    ("{files: [a], name: é}", "data.sources[0].name: 'é' is not allowed; it must be of letters, digits, _ and -"),
    ("{dataset: c4, validation_files: [b]}", "data.sources[0].validation_files: ['b'] is not allowed; it goes with"),
    ("{files: [a], dataset: c4}", "data.sources[0].dataset: c4 is not allowed; give either data.sources[0].files or"),
    ("{files: [a.txt], max_tokens: 0}", "data.sources[0].max_tokens: 0 is not allowed; it must be > 0"),
]


@pytest.mark.parametrize(("sources", "message"), BAD_SOURCES)
def test_bad_sources(sources, message):
    with pytest.raises(SettingsError) as error:
        LLM.parse(["--data.sources", f"[{sources}]"])
    assert message in str(error.value)


def test_settings_of_a_single_source_beside_several():
    for option, value in (("files", "b"), ("max_tokens", "7"), ("text_column", "content")):
        with pytest.raises(SettingsError, match=f"data.{option}: .* is not allowed; with data.sources, each source"):
            LLM.parse(["--data.sources", "[{files: [a.txt]}]", f"--data.{option}", value])


def make_bad_files(directory):
    write_text(directory / "good.txt")
    (directory / "empty.txt").write_text("")
    (directory / "latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    with gzip.open(directory / "c4-train.00000-of-00001.json.gz", "wt") as file:
        file.writelines(f'{{"text": "document {i}", "url": "x"}}\n' for i in range(5000))
    whole = (directory / "c4-train.00000-of-00001.json.gz").read_bytes()
    (directory / "truncated.json.gz").write_bytes(whole[: len(whole) // 2])
    (directory / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (directory / "no_text.jsonl").write_text('{"content": "a"}\n')
    (directory / "model.model").write_text("not a model")


# What reaches the user, whole: the launcher prints one line and no stack trace, before any training.
BAD_FILES = [
    ("--data.files {d}/nothing-*.txt", "data.files", "nothing-*.txt"),
    ("--data.files {d}/empty.txt", "empty.txt", "empty"),
    ("--data.files {d}/latin1.txt", "latin1.txt", "UTF-8"),
    ("--data.files {d}/truncated.json.gz", "truncated.json.gz", "truncated"),
    ("--data.files {d}/broken.jsonl", "broken.jsonl", "2"),
    ("--data.files {d}/no_text.jsonl", "no_text.jsonl", "text"),
    ("--data.files {d}/good.txt --tokenizer.file {d}/model.model", "model.model", ""),
    ("--data.files {d}/good.txt --tokenizer.file {d}/none.model", "none.model", ""),
    ("--data.files {d}/good.txt --tokenizer.name no/such-tokenizer", "tokenizer.name", "no/such-tokenizer"),
    ("--data.files {d}/good.txt --tokenizer.vocab_size 100000", "tokenizer.vocab_size", "100000"),
    ("--data.dataset no/such-dataset", "no/such-dataset", ""),
    ("--data.files {d}/good.txt --model.attention flex", "model.attention: flex", "on GPUs only"),
    (
        "--data.files {d}/good.txt --tokenizer.vocab_size 400 --run_dir {d}/good.txt/run",
        "run_dir",
        "good.txt",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "first", "second"), BAD_FILES, ids=[case[0].split("/")[-1] for case in BAD_FILES])
def test_bad_files(options, first, second, tmp_path):
    make_bad_files(tmp_path)
    arguments = options.format(d=tmp_path).split()
    if "--run_dir" not in arguments:
        arguments += ["--run_dir", str(tmp_path / "run")]
    output = launch(*arguments, expect=2)
    error = output[output.rindex("train_llm.py: error: ") :]
    assert first in error
    assert second in error
    assert "Traceback" not in output
    assert len(error.splitlines()) <= 3


def test_a_models_own_configuration_goes_with_a_way_to_attend():
    config = LLM.parse(["--model.config", "model.json", "--model.attention", "eager"])
    assert (config.model.config, config.model.attention) == ("model.json", "eager")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("schedule.name", "cosin", "it must be one of cosine, linear, constant, wsd"),
        ("optimizer.variant", "xx", "it must be one of p2, pp, 2p"),
        ("data.files", "a.txt", "it must be a list"),
        ("optimizer.betas", (0.9,), "it must be 2 values"),
        ("train.max_steps", "100", "it must be a whole number"),
        ("train.max_steps", True, "it must be a whole number"),
        ("train.compile", 1, "it must be true or false"),
        ("optimizer.lr", "0.1", "it must be a number"),
        ("run_dir", 3, "it must be text"),
        ("run_dir", None, "it must have a value"),
        ("optimizer.name", None, "it must have a value"),
        ("optimizer.lr", np.float64(0.1), "it must be a number, not of type float64"),
        ("optimizer.name", np.str_("stacey"), "it must be one of stacey"),
        ("train", 3, "it must be a LLMTrainConfig"),
        ("data", CorpusConfig(), "it must be a DataConfig"),
        ("data.sources", ["a.txt"], "each must be a SourceConfig"),
        ("train.gradient_checkpointing", "full", "it must be true or false or one of selective"),
    ],
)
def test_values_that_a_program_assigns(setting, value, message):
    config = LLMConfig()
    section, _, name = setting.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(SettingsError, match=f"^{re.escape(setting)}: .*{re.escape(message)}"):
        config.validate()


def test_whole_numbers_are_numbers():
    config = LLMConfig()
    config.optimizer.lr, config.schedule.warmup_steps = 1, 0.5
    config.validate()


def test_a_section_may_be_empty(tmp_path):
    """All of its lines may be comments."""
    (tmp_path / "a.yaml").write_text("optimizer:\n  # lr: 1.0\nseed: 3\n")
    assert parse(LLMConfig, ["--config", str(tmp_path / "a.yaml")]) == dataclasses.replace(LLMConfig(), seed=3)


def test_null_is_no_file_of_that_name(capsys):
    with pytest.raises(SystemExit):
        parse(LLMConfig, ["--data.files", "null"])
    assert "--data.files: null is not allowed; it must be a list" in capsys.readouterr().err


def test_help_has_no_options_that_do_not_exist(capsys):
    with pytest.raises(SystemExit):
        parse(LLMConfig, ["--help"])
    text = capsys.readouterr().out
    assert "Path to a configuration file" not in text
    assert "settings that equal the previous optimizer's defaults count as not given" in " ".join(text.split())


@dataclasses.dataclass
class Own(LLMConfig):
    """A program's settings."""

    names: list[str] | None = None
    """Names."""


def test_a_list_that_may_be_null(tmp_path):
    assert parse(Own, ["--names", "a", "b"]).names == ["a", "b"]
    assert parse(Own, ["--names", "a,b"]).names == ["a", "b"]
    assert parse(Own, ["--names", "null"]).names is None


@pytest.mark.parametrize("kind", [dict[str, int], tuple[int, ...], Path, list])
def test_types_that_settings_cannot_have(kind):
    config = dataclasses.make_dataclass("Bad", [("x", kind, None)], bases=(LLMConfig,))
    with pytest.raises(TypeError, match=r"Bad\.x: a setting of type .* is not supported; use bool, int"):
        parse(config, [])
