"""Damaged and forged files, by chance: what is read is right to the bit, or one of our errors says why it is not read.

Each case is a seed. A few hundred run always, thousands with -m exhaustive.
"""

import json
import os
import pickle
import random
import shutil

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.checkpoint import DamagedCheckpointError, load_checkpoint, read_tensors, save_checkpoint, verify
from stacey_dist.checkpoint.compare import differences
from stacey_dist.checkpoint.importers import ForeignCheckpointError, import_checkpoint
from stacey_dist.checkpoint.manifest import MANIFEST, digest
from stacey_dist.cli import main
from stacey_dist.errors import SettingsError
from stacey_dist.models.export import export_model
from tests.checkpoint.foreign import MAKERS
from tests.checkpoint.test_importers import is_right

FEW, MANY = range(4), range(4, 40)
SEEDS = [*FEW, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in MANY)]
CASES = 30
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../x", "/x",
    "\0", "\ud800", "\n\x1b[2J",
    "float32", "float16", [], {}, [[]], [[2], "float32"], {"bytes": 0}, "model/a", [1, 2, 3], {"step": "x"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Fail if a file calls anything."""

    def called(*arguments, **_):
        pytest.fail(f"called with {arguments}")

    for name in ("system", "popen", "execv", "execve"):
        monkeypatch.setattr(os, name, called)
    monkeypatch.setattr("builtins.eval", called)
    monkeypatch.setattr("builtins.input", called)


def damaged(content, chance):
    """Return bytes with some of them changed, cut, repeated, or put elsewhere."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        place = chance.randrange(len(content) + 1)
        other = chance.randrange(len(content) + 1)
        kind = chance.choice(["bit", "bit", "byte", "cut", "insert", "delete", "move"])
        if kind == "bit" and place < len(content):
            content[place] ^= 1 << chance.randrange(8)
        elif kind == "byte" and place < len(content):
            content[place] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = chance.randbytes(chance.randrange(1, 9))
        elif kind == "delete":
            del content[place : place + chance.randrange(1, 9)]
        else:
            content[place : place + 8] = content[other : other + 8]
    return bytes(content)


def damage_directory(directory, chance):
    """Damage one file, take it away, or put another in its place."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    file, other = chance.choice(files), chance.choice(files)
    kind = chance.choice(["damage"] * 6 + ["remove", "swap", "empty", "pipe"])
    content = file.read_bytes()
    if kind == "damage":
        file.write_bytes(damaged(content, chance))
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
    return f"{kind} {file.name}"


def mutated(value, chance):
    """JSON with one entry of it changed, taken away, or added."""
    value = json.loads(json.dumps(value))
    at, keys = value, []
    while isinstance(at, (dict, list)) and at and (not keys or chance.random() < 0.8):
        keys.append((at, chance.choice(list(at) if isinstance(at, dict) else range(len(at)))))
        at = keys[-1][0][keys[-1][1]]
    holder, key = keys[-1]
    kind = chance.choice(["replace", "replace", "replace", "remove", "rename", "copy"])
    if kind == "replace" or not isinstance(holder, dict):
        holder[key] = chance.choice(ODD)
    elif kind == "remove":
        del holder[key]
    elif kind == "rename":
        holder[str(chance.choice(ODD))] = holder.pop(key)
    else:
        holder[key] = holder[chance.choice(list(holder))]
    return value


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = Stacey(model.parameters())
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    model, optimizer = make()
    path = tmp_path_factory.mktemp("ours") / "step_00000001"
    save_checkpoint(path, model, optimizer, {"step": 1, "model": {"class": "LlamaForCausalLM", "config": {}}})
    return path, read_tensors(path)


@pytest.mark.parametrize("seed", SEEDS)
def test_files_of_a_checkpoint(ours, tmp_path, seed):
    path, right = ours
    for case in range(CASES):
        chance = random.Random(1000 * seed + case)
        copy = tmp_path / f"step_{case:08d}"
        shutil.copytree(path, copy)
        what = [damage_directory(copy, chance) for _ in range(chance.choice([1, 1, 2]))] if any(copy.iterdir()) else []
        try:
            verify(copy)
            there = read_tensors(copy)
        except (DamagedCheckpointError, OSError):
            continue
        assert there.keys() == right.keys(), what
        assert all(torch.equal(there[name], right[name]) for name in right), what


@pytest.mark.parametrize("seed", SEEDS)
def test_manifests_with_a_checksum_of_their_own(ours, tmp_path, seed, capsys):
    path, right = ours
    whole = json.loads((path / MANIFEST).read_text())
    del whole["extra"]["model"]
    for case in range(CASES):
        chance = random.Random(1000 * seed + case)
        copy = tmp_path / f"step_{case:08d}"
        shutil.copytree(path, copy)
        manifest = mutated(whole, chance)
        manifest["sha256"] = digest(manifest)
        (copy / MANIFEST).write_text(json.dumps(manifest))

        def read(copy=copy, manifest=manifest):
            for name, values in read_tensors(copy).items():
                kind = manifest["tensors"][name]
                if whole["tensors"].get(name) == kind:
                    assert torch.equal(values, right[name]), name

        works = [read, lambda copy=copy: differences(path, copy)]
        works += [lambda copy=copy: load_checkpoint(copy, *make()), lambda copy=copy: export_model(copy, copy / "out")]
        for work in works:
            try:
                work()
            except (DamagedCheckpointError, OSError, SettingsError):
                continue
        for command in ("show", "verify", "list"):
            assert main(["checkpoint", command, str(copy)]) in (0, 1)
        assert capsys.readouterr().err.count("\n") <= 2


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_checkpoints_of_others(tmp_path, maker, seed):
    MAKERS[maker](tmp_path / "saved")
    for case in range(CASES):
        chance = random.Random(1000 * seed + case)
        copy, out = tmp_path / f"copy{case}", tmp_path / f"step_{case:08d}"
        shutil.copytree(tmp_path / "saved", copy)
        what = damage_directory(copy, chance)
        try:
            import_checkpoint(copy, out)
        except (ForeignCheckpointError, OSError):
            assert not out.exists(), what
            continue
        # A bit of a name, or which tensors there are, is not covered by a checksum; each tensor's values are.
        verify(out)
        if what.endswith((".distcp", "latest")) and not what.startswith("swap"):
            assert is_right(out), what


@pytest.mark.parametrize("seed", SEEDS)
def test_metadata_of_other_objects(tmp_path, seed):
    """Pickles whose instructions are in order, with other values in them."""
    MAKERS["fsdp2"](tmp_path / "saved")
    file = tmp_path / "saved" / "optimizer_0" / ".metadata"
    whole = pickle.loads(file.read_bytes())
    for case in range(CASES):
        chance = random.Random(1000 * seed + case)
        metadata = pickle.loads(pickle.dumps(whole))
        holder = chance.choice(
            [metadata, metadata.state_dict_metadata, metadata.storage_data, *metadata.storage_data.values()]
            + [v for v in metadata.state_dict_metadata.values() if vars(v)]
        )
        entries = holder if isinstance(holder, dict) else vars(holder)
        key = chance.choice(list(entries))
        if isinstance(holder, dict) and chance.random() < 0.3:
            entries[chance.choice(["x", 7, None, ("a",), b"x"])] = entries.pop(key)
        else:
            entries[key] = chance.choice([*ODD, chance.choice(list(entries.values())), torch.float16, torch.Size([2])])
        file.write_bytes(pickle.dumps(metadata))
        out = tmp_path / f"step_{case:08d}"
        try:
            import_checkpoint(tmp_path / "saved", out)
        except ForeignCheckpointError:
            assert not out.exists()
            continue
        verify(out)
