"""The examples of the documentation run as they stand there."""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from stacey_dist import Stacey
from stacey_dist.sharding import base_optimizer, fragments
from stacey_dist.training import Callback
from stacey_dist.training.settings.image_config import ImageConfig
from stacey_dist.training.settings.llm_config import LLMConfig
from tests.sharding.processes import spawn
from tests.training.forked import Forked

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def example(name):
    """Return the code block after <!-- example: name --> in README.md or one of docs/."""
    text = "".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))))
    return re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", text, re.DOTALL)[1]


def tiny_llama(**changes):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, use_cache=False, **shape, **changes))


def make_batches(count, size=4, rank=0):
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.arange(17) * 3 + int(torch.randint(64, (1,), generator=generator)) for _ in range(count * size)]
    tokens = torch.stack(rows) % 64
    return [{"input_ids": part, "labels": part} for part in tokens.split(size)]


def run(name, **namespace):
    exec(compile(example(name), f"docs: {name}", "exec"), namespace)
    return namespace


def test_readme_example_learns():
    torch.manual_seed(0)
    assert run("readme")["loss"].item() < 1  # 64 at first, in expectation


def test_samples_are_read_in_ones_own_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("samples")
    assert len(names["windows"]) == 782  # of 100 000 tokens
    assert (names["labels"][:-1] == names["inputs"][1:]).all()


def deepspeed_example(rank):
    model = tiny_llama()
    batches = make_batches(4, rank=rank)
    names = run("deepspeed", model=model, batches=batches)
    assert type(base_optimizer(names["optimizer"])) is Stacey
    parts = fragments(names["engine"], names["optimizer"])
    assert all(f.step == 4 for f in parts)
    names = run("fragments", model=names["engine"], optimizer=names["optimizer"])
    return sum(f.stop - f.start for f in parts)


def test_deepspeed_example():
    total = sum(p.numel() for p in tiny_llama().parameters())
    assert total / 2 - 8 <= spawn(deepspeed_example, 2) <= total / 2 + 8


def fully_shard_example(rank, directory):
    def finish(model, optimizer, batches):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [f.weight.clone() for f in fragments(model, optimizer)]

    dist.init_device_mesh("cpu", (dist.get_world_size(),))
    batches = make_batches(6, rank=rank)
    names = run("fully_shard", model=tiny_llama(), batches=batches[:3])
    model, optimizer = names["model"], names["optimizer"]
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=directory)
    expected = finish(model, optimizer, batches[3:])
    names = run("fully_shard", model=tiny_llama(), batches=batches[:1])
    model, optimizer = names["model"], names["optimizer"]
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    assert all(f.z.dtype == torch.bfloat16 for f in fragments(model, optimizer))
    resumed = finish(model, optimizer, batches[3:])
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))


def test_fully_shard_example_trains_and_resumes(tmp_path):
    spawn(fully_shard_example, 2, str(tmp_path))


def accelerate_example():
    model = tiny_llama()
    batches = make_batches(20)
    before = model(**batches[0]).loss.item()
    names = run("accelerate", model=model, batches=batches)
    assert names["model"](**batches[0]).loss.item() < before - 0.1


def trainer_example():
    def train(steps_done):
        dataset = [{"input_ids": row, "labels": row} for b in make_batches(12, size=8) for row in b["input_ids"]]
        checkpoint = f"out/checkpoint-{steps_done}" if steps_done else None
        return run("trainer", model=tiny_llama(), dataset=dataset, checkpoint=checkpoint)["trainer"]

    whole = train(0)
    assert type(base_optimizer(whole.optimizer)) is Stacey
    assert {group["weight_decay"] for group in whole.optimizer.param_groups} == {0.0, 0.1}
    assert {group["p"] for group in whole.optimizer.param_groups} == {30}
    resumed = train(3)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    states = base_optimizer(resumed.optimizer).state.values()
    assert {state["z"].dtype for state in states} == {torch.bfloat16}
    assert {int(state["step"]) for state in states} == {6}


@pytest.mark.parametrize("name", ["accelerate", "trainer"])
def test_example_in_a_process_of_its_own(name, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(f"from tests.test_docs import *; {name}_example()")
    monkeypatch.chdir(tmp_path)
    output, status = Forked(program=program).wait()
    assert status == 0, output[-4000:]


def test_library_example(tmp_path):
    model = tiny_llama()
    optimizer = Stacey(model.parameters(), lr=0.01)
    model(**make_batches(1)[0]).loss.backward()
    optimizer.step()
    expected = [p.detach().clone() for p in model.parameters()]
    names = run("library", model=model, optimizer=optimizer, directory=tmp_path)
    assert names["manifest"]["extra"] == {"position": 100}
    assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))


def test_callback_example(capsys):
    callback = run("callback")["BestLoss"]()
    assert isinstance(callback, Callback)
    for step, loss in enumerate((3.0, 2.0, 2.5)):
        callback.on_evaluation_end(SimpleNamespace(step=step, run=SimpleNamespace(say=print)), {"eval_loss": loss})
    assert capsys.readouterr().out.splitlines()[-1] == "best held-out loss so far: 2.0000, update 2"


def test_grad_scale_example():
    outcomes = []
    for by_hand in (True, False):
        model = tiny_llama()
        optimizer = Stacey(model.parameters(), lr=0.01)
        for batch in make_batches(2):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            if by_hand:
                norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters())
                scale = (norm / 0.01).clamp(min=1.0).double().reciprocal().float()
                for p in model.parameters():
                    p.grad.mul_(scale)
                optimizer.step()
            else:
                run("grad_scale", torch=torch, model=model, optimizer=optimizer, max_norm=0.01)
        outcomes.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_the_table_of_settings_has_the_defaults():
    text = (ROOT / "docs" / "how-to" / "settings.md").read_text()
    table = text.split("| setting | class | `train_llm.py` | `train_imagenet.py` | |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    written = {row[0].strip("`"): row[1:4] for row in rows}
    parameters = inspect.signature(Stacey).parameters
    for name in ("lr", "p", "variant", "alpha", "tau", "betas", "eps", "weight_decay", "z_init"):
        own, llm, images = (cell.partition(", in proportion")[0] for cell in written[name])
        assert ast.literal_eval(own.strip("`")) == parameters[name].default, name
        for shown, config in ((llm, LLMConfig()), (images, ImageConfig())):
            assert ast.literal_eval(shown.strip("`")) == getattr(config.optimizer, name), name
