"""The coupling's figures by hand, and the experiment end to end at a toy scale."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from experiments import coupling, registry
from experiments.__main__ import main
from experiments.framework import Scale
from stacey_dist import Stacey
from stacey_dist.training.reports.rows import read_rows
from tests.experiments.tasks import write_sweeps

RATES = dict(lr=0.05, p=3.0, alpha=0.5, tau=0.1, betas=(0.8, 0.9), weight_decay=0.2)


def test_the_columns_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(coupling, "EVERY", 2)
    monkeypatch.setattr(coupling, "HORIZON", 4)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2, bias=False)})
    optimizer = Stacey(model.parameters(), variant="p2", state_dtype=torch.float32, **RATES)
    run = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, is_main_process=True), directory=tmp_path, say=print
    )
    engine = SimpleNamespace(optimizer=optimizer, module=model)
    training = SimpleNamespace(run=run, engine=engine, step=0)
    watch = coupling.Coupling()
    watch.on_run_begin(training)
    slow = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    expected = []
    for step in range(4):
        watch.on_update_begin(training)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            slow[name] = 0.75 * slow[name] + 0.25 * parameter.grad
        optimizer.step()
        training.step = step + 1
        watch.on_update_end(training)
        flat = {}
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            pulled = 0.1 * (state["z"] - before[name])
            tensors = (pulled, parameter.detach() - before[name] - pulled, state["z"], state["m"], slow[name])
            flat.setdefault(name[0], []).append([tensor.flatten().double() for tensor in tensors])
        row = {}
        for layer, columns in flat.items():
            pulled, rest, z, m, average = (torch.cat(column) for column in zip(*columns, strict=True))
            cosine = torch.nn.functional.cosine_similarity
            row[f"share/{layer}"] = (pulled.norm() / (pulled.norm() + rest.norm())).item()
            row[f"z_slow/{layer}"] = cosine(z, -average, dim=0).item()
            row[f"m_slow/{layer}"] = cosine(m, average, dim=0).item()
            row[f"with_rest/{layer}"] = cosine(pulled, rest, dim=0).item()
        expected.append({"step": step + 1, **row})
    watch.on_run_end(training)
    rows = read_rows(tmp_path / "coupling.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    for row, wanted in zip(rows, expected[1::2], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)  # sums of float32 numbers
    assert 0.05 < rows[-1]["share/a"] < 0.95


@pytest.mark.exhaustive
def test_end_to_end(tmp_path, monkeypatch, capsys):
    configs = write_sweeps(tmp_path)
    monkeypatch.setattr(coupling, "configs", lambda: configs)
    runs = {"pp": {"optimizer.variant": "pp", "optimizer.tau": 1e-4}}
    toy = Scale("a toy", 2, {"runs": runs, "all": {"optimizer.name": "stacey", "train.max_steps": 100}})
    monkeypatch.setitem(registry.EXPERIMENTS["coupling"].scales, "toy", toy)
    assert main(["reproduce", "coupling", "--scale", "toy", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert {name: len(runs) for name, runs in found.items()} == {"pp": 2}
    for runs in found.values():
        for rows in runs:
            assert [row["step"] for row in rows] == [50, 100]
            assert all(math.isfinite(value) for row in rows for value in row.values())
    # z begins where the weights do: as it goes away from them, so does what it adds to an update.
    shares = [row["share/model.layers.0"] for row in found["pp"][0]]
    assert shares[0] < shares[-1] < 1
    table = (tmp_path / "out/table.md").read_text()
    assert table.count("| pp | ") == 4
    assert (tmp_path / "out/coupling.png").is_file()
