"""The norms of layers, against the same in float64 from what the optimizer had and made."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.training.reports.norms import KINDS, Norms, draw_norms, layer_of


def test_a_layer_ends_at_the_first_number():
    assert layer_of("model.layers.11.mlp.experts.3.weight") == "model.layers.11"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_of("0.bias") == "0"
    assert layer_of("scale") == "scale"


@pytest.mark.parametrize("divisor", [None, 2.5])
def test_norms_of_an_update_are_those_of_its_tensors(tmp_path, divisor):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"first": torch.nn.Linear(7, 5), "second": torch.nn.Linear(5, 3), "frozen": torch.nn.Linear(2, 2)}
    )
    model["frozen"].requires_grad_(False)
    optimizer = Stacey(model.parameters(), lr=0.05, p=3, alpha=0.2, tau=0.1)
    engine = SimpleNamespace(model=model, module=model, optimizer=optimizer)
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cpu"), trackers=[])
    run = SimpleNamespace(accelerator=accelerator, directory=tmp_path, say=print)
    training, norms = SimpleNamespace(run=run, engine=engine, step=0), Norms(2)
    norms.on_run_begin(training)
    for step in range(1, 5):
        for param in model.parameters():
            param.grad = torch.randn_like(param) if param.requires_grad else None
        before = {name: param.detach().double() for name, param in model.named_parameters()}
        norms.on_update_begin(training)
        if divisor is not None:
            optimizer.grad_scale = torch.tensor(divisor)
        optimizer.step()
        training.step = step
        norms.on_update_end(training)
        assert not optimizer._optimizer_step_pre_hooks
    rows = [json.loads(line) for line in (tmp_path / "norms.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    expected = {"step": 4}
    for layer in ("first", "second"):
        squares = dict.fromkeys(KINDS, 0.0)
        for name, param in model.named_parameters():
            if name.startswith(layer):
                state, now = optimizer.state[param], param.detach().double()
                tensors = (
                    now,
                    param.grad.double() / (divisor or 1),
                    now - before[name],
                    state["m"].double(),
                    state["z"].double() - now,
                )
                for kind, tensor in zip(KINDS, tensors, strict=True):
                    squares[kind] += float(tensor.square().sum())
        expected |= {f"{kind}/{layer}": math.sqrt(value) for kind, value in squares.items()}
    # Float32 norms and differences of some 40 elements.
    assert rows[-1] == pytest.approx(expected, rel=1e-5)
    draw_norms(tmp_path / "norms.jsonl")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
