"""A run on several sources: what is trained on, on any number of processes, and what is reported of each source."""

import dataclasses
import json
import math
import random
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from stacey_dist.cli import main
from stacey_dist.data import MixedSampler
from stacey_dist.data.source import files_source, hub_source
from stacey_dist.errors import SettingsError
from stacey_dist.training.settings.command_line import parse
from stacey_dist.training.settings.llm_config import LLMConfig, SourceConfig
from stacey_dist.training.tasks import text_data
from tests.shared import made_once
from tests.training.forked import Forked
from tests.training.helpers import SMOOTH, TINY, rows, samples, training_rows, write_text

LENGTH, BATCH, END, HALF = 32, 8, 8, 4
WEIGHTS = {"web": 0.75, "sums": 0.25}
SHARES = (3, 1)


def write_mixture(directory, **changes):
    """mixture.yaml in `directory`, with a long and a short text."""
    write_text(directory / "web.txt")
    rng = random.Random(1)
    sums = ((a, b) for a, b in zip(rng.choices(range(99), k=900), rng.choices(range(99), k=900), strict=True))
    lines = [json.dumps({"sum": f"{a} + {b} = {a + b}. " * 3}) for a, b in sums]
    (directory / "sums-0.jsonl").write_text("\n".join(lines))
    data = {
        "sources": [
            {"files": [str(directory / "web.txt")], "weight": WEIGHTS["web"], "validation_every": 25},
            {"files": [f"{directory}/sums-*.jsonl"], "weight": WEIGHTS["sums"], "text_column": "sum"},
        ],
        "sequence_length": LENGTH,
        "cache_dir": str(directory / "cache"),
    }
    train = {"max_steps": END, "global_batch_size": BATCH, "eval_every_steps": END}
    config = TINY | {"data": data, "train": TINY["train"] | train, "checkpoint": {"every_steps": HALF}} | changes
    (directory / "mixture.yaml").write_text(yaml.safe_dump(config))
    return directory / "mixture.yaml"


def opened(config):
    """Return a run's data, and what it says of them."""
    said = []
    main_process = SimpleNamespace(is_local_main_process=False, device=torch.device("cpu"))
    run = SimpleNamespace(config=config, accelerator=main_process, say=said.append, call_on_main=lambda work: work())
    return text_data.prepare_data(run), "\n".join(said)


def prepare(directory):
    return directory, write_mixture(directory)


@pytest.fixture(scope="module")
def mixture():
    return made_once(prepare)


def run(directory, config, *arguments, processes=1):
    output, status = Forked(
        "--config", config, "--run_dir", directory / "run", *SMOOTH, *arguments, processes=processes,
        engine=None if processes == 1 else "cpu_ddp", program="tests/training/instrumented.py",
        RECORD=directory / "samples",
    ).wait()  # fmt: skip
    assert status == 0, output
    return output


def train_on_one(directory, config):
    return directory, run(directory, config)


@pytest.fixture(scope="module")
def whole(mixture):
    """Return the directory of a run that stayed on one process, and its output."""
    return made_once(train_on_one, mixture[1])


def tokens(config, name, split):
    """Return the tokens of a source's split as one array."""
    number = list(WEIGHTS).index(name)
    directory = text_data.tokenize(parse(LLMConfig, ["--config", str(config)]))[0][number]
    return np.concatenate([np.fromfile(part, "<u2") for part in sorted(directory.glob(f"{split}-*.bin"))])


@pytest.mark.slow
def test_the_samples_are_windows_of_the_sources_in_their_shares(mixture, whole):
    train = [tokens(mixture[1], name, "train").astype(np.int64) for name in WEIGHTS]
    sizes = [-(-(len(stream) - 1) // LENGTH) for stream in train]
    order = MixedSampler(sizes, SHARES, seed=0)
    found = samples(whole[0], processes=1)
    assert list(found) == list(range(0, END * BATCH, BATCH))
    for position, sums in found.items():
        sources, windows = order.samples(position, BATCH)
        assert np.bincount(sources).tolist() == [6, 2]
        for source, window, found_sum in zip(sources.tolist(), windows.tolist(), sums, strict=True):
            content = train[source][window * LENGTH : (window + 1) * LENGTH + 1]
            if len(content) == LENGTH + 1:  # not the last window, which has padding
                assert found_sum == zlib.crc32(content[:-1].tobytes(), zlib.crc32(content[1:].tobytes()))


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_micro_batches(mixture, whole, tmp_path):
    checkpoint = whole[0] / "run/checkpoints" / f"step_{HALF:08d}"
    moved = ("--checkpoint.resume_from", checkpoint, "--train.micro_batch_size", "2")
    run(tmp_path, mixture[1], *moved, processes=2)
    expected = {position: ids for position, ids in samples(whole[0], 1).items() if position >= HALF * BATCH}
    assert samples(tmp_path, 2) == expected
    ours, theirs = training_rows(tmp_path / "run"), training_rows(whole[0] / "run")[HALF:]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)  # float32 sums in another order
        assert {name: a[name] for name in a if "epoch" in name} == {name: b[name] for name in b if "epoch" in name}
    ours, theirs = (rows(directory / "run")[-1] for directory in (tmp_path, whole[0]))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.slow
def test_every_source_is_evaluated_and_counted(mixture, whole):
    directory, output = whole
    row, streams = rows(directory / "run")[-1], {name: tokens(mixture[1], name, "validation") for name in WEIGHTS}
    model = AutoModelForCausalLM.from_pretrained(directory / "run/model").eval()
    total = 0.0
    for name, stream in streams.items():
        loss, ids = 0.0, torch.from_numpy(stream.astype(np.int64))
        with torch.no_grad():
            for start in range(0, len(ids) - 1, LENGTH):
                window = ids[start : start + LENGTH + 1]
                logits = model(input_ids=window[None, :-1]).logits[0].double()
                loss -= logits.log_softmax(-1).gather(1, window[1:, None]).sum().item()
        total += loss
        # The same sums in float32 and other batches: about 1e-7 relative for each token's loss.
        assert row[f"eval_loss_of.{name}"] == pytest.approx(loss / (len(ids) - 1), rel=1e-5)
    mean = total / sum(len(stream) - 1 for stream in streams.values())
    assert row["eval_loss"] == pytest.approx(mean, rel=1e-5)
    assert row["eval_perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert abs(row["eval_loss_of.web"] - row["eval_loss_of.sums"]) > 0.01
    windows = {name: -(-(len(tokens(mixture[1], name, "train")) - 1) // LENGTH) for name in WEIGHTS}
    for step, row in enumerate(training_rows(directory / "run"), start=1):
        assert row["epoch"] == round(step * BATCH / sum(windows.values()), 4)
        assert row["epoch_of.web"] == round(step * 6 / windows["web"], 4)
        assert row["epoch_of.sums"] == round(step * 2 / windows["sums"], 4)
    last = f"epoch_of.web {END * 6 / windows['web']:.4f}  epoch_of.sums {END * 2 / windows['sums']:.4f}"
    assert output.count(last) == 1


def test_units_count_the_partial_windows_of_every_source(mixture):
    config = parse(LLMConfig, ["--config", str(mixture[1]), "--data.sequence_length", "999"])
    data, said = opened(config)
    assert "  web: 3 of 4 sequences (75.00%), " in said
    assert "  sums: 1 of 4 sequences (25.00%), " in said
    from stacey_dist.training.tasks.llm import LanguageModeling

    task = LanguageModeling.__new__(LanguageModeling)
    streams = [corpus.train for corpus in data.corpora]
    assert all(stream.label_count(len(stream) - 1) < 999 for stream in streams)
    task.run, task.data, task.batch_size = SimpleNamespace(config=config), data, 20
    task.sampler = MixedSampler(list(map(len, streams)), SHARES, seed=0)
    counted = []
    for position in range(0, 400, 20):
        drawn = zip(*task.sampler.samples(position, 20), strict=True)
        assert task.units(position) == sum(streams[source].label_count(window) for source, window in drawn)
        counted.append(task.units(position))
        assert task.units_before(position + 20) == sum(counted)


def test_the_identity_is_of_tokens_and_weights(mixture, tmp_path):
    config = parse(LLMConfig, ["--config", str(mixture[1]), "--data.cache_dir", str(tmp_path)])
    text_data.tokenize(config)
    (model,) = tmp_path.glob("tokenizer-*/tokenizer.model")  # one for all
    config.tokenizer.file = str(model)
    web, sums = config.data.sources
    replace = dataclasses.replace

    def identity(*sources):
        return opened(replace(config, data=replace(config.data, sources=list(sources))))[0].identity

    same = identity(web, sums)
    assert identity(replace(web, weight=300.0), replace(sums, weight=100.0, name="other")) == same
    assert identity(web, replace(sums, weight=0.3)) != same
    assert len({identity(web, replace(web, name="again")), identity(web, sums), identity(sums, web)}) == 3
    # A mixture of one source is that source.
    alone = {f.name: getattr(web, f.name) for f in dataclasses.fields(SourceConfig) if f.name not in ("weight", "name")}
    single = replace(config, data=replace(config.data, sources=[], **alone))
    assert identity(web) == opened(single)[0].identity
    assert "web" not in opened(single)[1]


def test_a_source_that_was_prepared_for_one_mixture_is_found_in_another(mixture, capsys, tmp_path, monkeypatch):
    arguments = ["prepare", "--config", str(mixture[1]), "--data.cache_dir", str(tmp_path)]
    assert main(arguments) == 0
    *_, web, sums = (line.partition(": ") for line in capsys.readouterr().out.splitlines())
    assert web[2].endswith(" held-out tokens, vocabulary 400")
    (model,) = tmp_path.glob("tokenizer-*/tokenizer.model")
    monkeypatch.setattr("stacey_dist.data.cache.Preparation", None)  # nothing is made again
    others = [{"files": [str(mixture[0] / "sums-0.jsonl")], "text_column": "sum", "name": name} for name in "ab"]
    options = ["--tokenizer.file", str(model), "--data.sources", json.dumps(others)]
    assert main([*arguments, *options]) == 0
    assert [line.partition(": ") for line in capsys.readouterr().out.splitlines()] == [sums, sums]
    assert main([*arguments, "--data.sources", json.dumps([*others, {"files": ["none.txt"]}])]) == 2
    error = "stacey-dist prepare: error: data.sources[2].files: 'none.txt' matches no file\n"
    assert capsys.readouterr().err == error


def test_no_source_trains_on_what_another_holds_out(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]
    for path in paths:
        Path(path).write_text("text")
    a, b, c = paths

    def check(*sources):
        made = [files_source(files, held_out, "text") for files, held_out in sources]
        corpora = {
            f"data.sources[{i}].": SourceConfig(files=files, validation_every=10 + i % 3)
            for i, (files, _) in enumerate(sources)
        }
        text_data._check_apart(corpora, made)

    check(([a], [b]), ([c], []))
    check(([a], [b]), ([a], [b]))
    check(([a], []), ([c], []), ([b], []), ([a], []))  # the same documents are held out of both
    with pytest.raises(
        SettingsError, match=rf"data.sources\[0\].validation_files: {b} has text of data.sources\[1\].f"
    ):
        check(([a], [b]), ([b, c], []))
    with pytest.raises(SettingsError, match=rf"data.sources\[1\].files: {a} has text of data.sources\[0\].files, "):
        check(([a], [b]), ([a], []))


def test_no_source_trains_on_another_ones_validation_split():
    def check(*splits):
        made = [hub_source("a/b", "en", *each, column, True) for *each, column in splits]
        corpora = {f"data.sources[{i}].": SourceConfig(validation_every=10 + i) for i in range(len(made))}
        text_data._check_apart(corpora, made)

    check(("train", "validation", "text"), ("other", None, "text"))
    message = (
        r"data.sources\[0\].dataset_validation_split: split 'validation' of 'a/b', configuration 'en' has text of "
        r"data.sources\[1\].dataset: it would be trained on"
    )
    with pytest.raises(SettingsError, match=message):
        check(("train", "validation", "text"), ("validation", None, "title"))
    message = r"data.sources\[0\].dataset: split 'train' of 'a/b', configuration 'en' has text of data.sources\[1\]"
    with pytest.raises(SettingsError, match=message):
        check(("train", None, "text"), ("train", None, "text"))
    check(("train[1%:]", "train[:1%]", "text"), ("train[2%:]", "train[:1%]", "title"))
    with pytest.raises(SettingsError, match=r"split 'train\[:1%\]' of 'a/b'.* has text of data.sources\[1\].dataset: "):
        check(("train[1%:]", "train[:1%]", "text"), ("train", "test", "title"))


def test_damage_is_found_in_every_source(tmp_path):
    config = parse(LLMConfig, ["--config", str(write_mixture(tmp_path))])
    directories, _ = text_data.tokenize(config)
    part = directories[1] / "train-00000.bin"
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    with pytest.raises(ValueError, match=f"{part} does not hold what was written: the run stops"):
        text_data.Verification(*directories).check(finish=True)
