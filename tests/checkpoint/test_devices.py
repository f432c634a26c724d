"""A checkpoint from the CPU to a GPU and back, bit for bit, with the way onward."""

import pytest

from stacey_dist.checkpoint import load_checkpoint
from stacey_dist.checkpoint.snapshot import snapshot
from stacey_dist.checkpoint.write import write
from stacey_dist.sharding import fragments
from tests.sharding.engines import assert_equal
from tests.sharding.problem import CASES, Awkward, gradients, group_settings, one_process

CASE = "p2-stochastic"
STEPS = 3  # on each device


@pytest.mark.parametrize("other", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_there_and_back(tmp_path, other):
    optimizer_class, settings = CASES[CASE]
    path = None
    for stage, device in enumerate(("cpu", other, "cpu")):
        model = Awkward().to(device)
        optimizer = optimizer_class(group_settings(CASE)(model), **settings)
        if path is not None:
            load_checkpoint(path, model, optimizer)
        for step in range(STEPS * stage, STEPS * (stage + 1)):
            optimizer.zero_grad()
            model(gradients(step, model)).backward()
            optimizer.step()
        found = fragments(model, optimizer)
        assert {tensor.device.type for f in found for tensor in (f.weight, *f.state.values())} == {device}
        ours = {
            f.name: (f.weight.reshape(f.shape).cpu(), {k: v.reshape(f.shape).cpu() for k, v in f.state.items()})
            for f in found
        }
        assert_equal(
            {name: (weight, {**state, "step": STEPS * (stage + 1)}) for name, (weight, state) in ours.items()},
            one_process(CASE, steps=STEPS * (stage + 1), scheduled=False),
        )
        copies = snapshot(model, optimizer)
        again = snapshot(model, optimizer, copies.host_memory)  # as the run's next checkpoint
        for name, memory in again.host_memory.items():
            if memory.numel() and not name.endswith("/step"):  # which the CPU counts
                assert memory.is_pinned() == (device == "cuda"), name
        path = tmp_path / f"step_{stage + 1:08d}"
        write(path, again, {})
