"""Layouts of other makers' checkpoints that look alike: each is read as it was saved, or refused."""

import math

import pytest
import torch
from safetensors.torch import save_file

from stacey_dist import Stacey
from stacey_dist.checkpoint import read_tensors
from stacey_dist.checkpoint.importers import ForeignCheckpointError, deepspeed, import_checkpoint
from tests.checkpoint.foreign import SHAPES, make_zero1, tensors


def change_optimizers(source, change):
    for file in source.glob("step3/*optim_states.pt"):
        content = torch.load(file)
        change(content["optimizer_state_dict"])
        torch.save(content, file)


def test_deepspeed_may_align_each_parameter(tmp_path):
    counts = [math.prod(shape) for shape in SHAPES.values()]
    gaps, end = [], 0
    for count in counts:
        end += count
        gaps.append(-end % 8)
        end += gaps[-1]
    gaps[-1] = 0  # what is at the end is padding of the group
    make_zero1(tmp_path / "saved", gaps=gaps)
    weights, states = tensors()
    there = read_tensors(import_checkpoint(tmp_path / "saved", tmp_path / "out"))
    assert any(gaps)
    for name, weight in weights.items():
        assert torch.equal(there[f"model/{name}"], weight)
        assert torch.equal(there[f"optimizer/{name}/z"], states[name]["z"])


@pytest.mark.parametrize("change", ["longer", "shorter"])
@pytest.mark.parametrize("what", ["weights", "states"])
def test_a_flat_group_is_used_up(tmp_path, change, what):
    make_zero1(tmp_path / "saved")

    def alter(optimizer):
        def altered(flat):
            return torch.cat([flat, flat]) if change == "longer" else flat[:-1].clone()

        if what == "weights":
            optimizer["single_partition_of_fp32_groups"] = [altered(optimizer["single_partition_of_fp32_groups"][0])]
        else:
            optimizer["base_optimizer_state"][0]["z"] = altered(optimizer["base_optimizer_state"][0]["z"])

    change_optimizers(tmp_path / "saved", alter)
    with pytest.raises(ForeignCheckpointError, match=r"should have 26 elements, but there are .* another layout"):
        import_checkpoint(tmp_path / "saved", tmp_path / "out")


def test_shards_of_a_part_of_the_ranks_are_refused(tmp_path):
    """MiCS, where two of four ranks have all of a parameter."""
    weights, states = tensors()
    tmp_path.joinpath("saved").mkdir()
    for rank in range(4):

        def flat(values, rank=rank):
            padded = (torch.cat([v.reshape(-1), v.new_zeros(v.numel() % 2)]) for v in values)
            return torch.cat([v.chunk(2)[rank % 2] for v in padded])

        state = {key: flat([states[name][key] for name in SHAPES]) for key in "zm"} | {"step": torch.tensor(3.0)}
        optimizer = {
            "partition_count": 4,
            "fp32_flat_groups": [flat(weights.values())],
            "optimizer_state_dict": {"state": {0: state}},
        }
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer}, tmp_path / "saved" / f"{prefix}_optim_states.pt")
        shapes = [{name: torch.Size(shape) for name, shape in SHAPES.items()}]
        torch.save({"module": {}, "param_shapes": shapes}, tmp_path / "saved" / f"{prefix}_model_states.pt")
    with pytest.raises(ForeignCheckpointError, match=r"of rank 0 should have 7 elements, but there are 13"):
        import_checkpoint(tmp_path / "saved", tmp_path / "out")


def test_one_tensor_in_many_groups_is_refused_before_it_is_copied(tmp_path, monkeypatch):
    make_zero1(tmp_path / "saved")

    def alter(optimizer):
        for key in ("single_partition_of_fp32_groups", "base_optimizer_state"):
            optimizer[key] *= 1000

    change_optimizers(tmp_path / "saved", alter)
    monkeypatch.setattr(deepspeed, "_joined", lambda ranks: pytest.fail("it was copied"))
    with pytest.raises(ForeignCheckpointError, match="its tensors are larger than its files"):
        import_checkpoint(tmp_path / "saved", tmp_path / "out")


def trained(names_in_order):
    """Return a model, and its optimizer of pairs in an order of their own."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    params = dict(model.named_parameters())
    optimizer = Stacey([{"params": [(name, params[name]) for name in names]} for names in names_in_order])
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    return model, optimizer


ORDER = [["1.weight", "0.weight"], ["1.bias", "0.bias"]]


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "saved").mkdir()
    model, optimizer = trained(ORDER)
    save_file(model.state_dict(), tmp_path / "saved" / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "saved" / "optimizer.bin")
    return tmp_path / "saved", model, optimizer


@pytest.mark.parametrize("parameters", [None, [["0.weight"], ["0.bias"], ["1.weight"], ["1.bias"]]])
def test_the_names_that_an_optimizer_knows_are_used(tmp_path, saved, parameters):
    source, model, optimizer = saved
    there = read_tensors(import_checkpoint(source, tmp_path / "out", parameters=parameters))
    for name, param in model.named_parameters():
        assert torch.equal(there[f"optimizer/{name}/z"], optimizer.state[param]["z"])


def test_names_of_other_parameters_are_not_used(tmp_path, saved):
    source, _, optimizer = saved
    content = optimizer.state_dict()
    for group in content["param_groups"]:
        group["param_names"] = [f"head.{i}" for i in group["params"]]
    torch.save(content, source / "optimizer.bin")
    with pytest.raises(ForeignCheckpointError, match="its optimizer's state has no names"):
        import_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("another", ["model_1.safetensors", "pytorch_model_1.bin", "optimizer_1.bin", "optimizer_1"])
def test_of_several_models_none_is_chosen(tmp_path, saved, another):
    source, model, _ = saved
    save_file(model.state_dict(), source / another)
    with pytest.raises(ForeignCheckpointError, match=f"it holds several models or optimizers .{another}"):
        import_checkpoint(source, tmp_path / "out")


def test_a_tensor_in_two_files_is_refused(tmp_path, saved):
    source, model, _ = saved
    (source / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({"0.weight": model[0].weight.detach()}, source / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(
        ForeignCheckpointError, match=r"00002-of-00002\.safetensors: 0\.weight is in an earlier file, too"
    ):
        import_checkpoint(source, tmp_path / "out")
