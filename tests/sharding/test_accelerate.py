"""Programs under `accelerate launch`: save_state, load_state, importing it, and engines that do not come up."""

import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from stacey_dist import Stacey
from stacey_dist.checkpoint import read_tensors, verify
from stacey_dist.checkpoint.compare import differences
from stacey_dist.checkpoint.importers import ForeignCheckpointError, import_checkpoint
from stacey_dist.cli import main
from stacey_dist.errors import SettingsError
from stacey_dist.sharding import fragments
from stacey_dist.training.processes import launch
from stacey_dist.training.settings.llm_config import LLMConfig
from tests.shared import made_once
from tests.test_docs import tiny_llama
from tests.training.forked import Forked

BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
LAUNCHES = {
    "ddp": ("cpu_ddp", {}),
    "zero1": ("cpu_zero1", {}),
    "zero2 in bf16": ("cpu_zero2", BF16),
    "zero3": ("cpu_zero3", {}),
    "zero3 in bf16": ("cpu_zero3", BF16),
    "fsdp2": ("cpu_fsdp2", {}),
    "fsdp2, full state": ("cpu_fsdp2", {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
}


def save(directory, name):
    """Launch the program, which saves in the directory; return the directory and what was printed."""
    engine, variables = LAUNCHES[name]
    program = "tests/sharding/accelerate_program.py"
    output, status = Forked(directory, program=program, processes=2, engine=engine, **variables).wait()
    assert status == 0, output[-5000:]
    return directory, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in ("zero1", "zero3 in bf16"))) for name in LAUNCHES],
)
def test_save_state_and_load_state(name):
    _, output = made_once(save, name)
    assert "rank 0 is as expected" in output
    assert "rank 1 is as expected" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_what_accelerate_saved_is_imported_to_the_bit(tmp_path, capsys, name):
    directory, _ = made_once(save, name)
    config = tiny_llama(tie_word_embeddings=True).config
    config.save_pretrained(tmp_path / "model")
    out = tmp_path / "step_00000003"
    command_line = ["checkpoint", "import", str(directory / "saved"), str(out), "--position", "24"]
    if name == "ddp":
        assert main(command_line) == 1
        assert "state has no names; give --model, which has the order of its parameters" in capsys.readouterr().err
        assert main([*command_line, "--model", str(tmp_path / "model")]) == 1
        assert "its optimizer is of 19 parameters, but the model has 20 trainable ones" in capsys.readouterr().err
        command_line += ["--model", str(tmp_path / "model"), "--frozen", "*.1.self_attn.k_proj.weight"]
        assert main(command_line) == 1
        assert "its optimizer has 2 groups, of 14, 5 parameters" in capsys.readouterr().err
        command_line += ["--group", "*proj.weight", "*embed_tokens.weight", "--group", "*norm*"]
    assert main(command_line) == 0
    assert "to resume, with the data from sample 24" in capsys.readouterr().out
    assert differences(out, directory / "ours") == []
    extra = verify(out)["extra"]
    assert (extra["step"], extra["position"], extra["skipped_steps"]) == (3, 24, 0)
    assert main(command_line) == 1
    assert f"{out} is there already" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle was opened",))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("ddp", "optimizer.bin", "print"),
        ("zero1", "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt", "print"),
        ("fsdp2", "optimizer_0/.metadata", "builtins.print has no place in it"),
    ],
)
def test_an_importer_runs_nothing_that_is_in_a_file(tmp_path, capsys, name, file, message):
    shutil.copytree(made_once(save, name)[0] / "saved", tmp_path / "saved")
    target = tmp_path / "saved" / file
    if name == "fsdp2":
        target.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"optimizer_state_dict": Bomb(), "state": {}}, target)
    assert main(["checkpoint", "import", str(tmp_path / "saved"), str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert str(target.parent) in captured.err
    assert "a pickle was opened" not in captured.out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("zero1", "pytorch_model/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("zero3", "pytorch_model/zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("zero3", "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("fsdp2", "pytorch_model_fsdp_0/__1_0.distcp"),
        ("fsdp2", "pytorch_model_fsdp_0/.metadata"),
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_an_importer_says_what_is_missing_or_cut_short(tmp_path, capsys, name, file, cut):
    shutil.copytree(made_once(save, name)[0] / "saved", tmp_path / "saved")
    target = tmp_path / "saved" / file
    content = target.read_bytes()
    target.unlink()
    if cut:
        target.write_bytes(content[: len(content) // 2])
    assert main(["checkpoint", "import", str(tmp_path / "saved"), str(tmp_path / "out")]) == 1
    assert "Traceback" not in (err := capsys.readouterr().err)
    assert str(target.parent) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("ddp", "optimizer.bin", {"state": {}}),
        ("ddp", "optimizer.bin", 7),
        ("zero1", "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt", {"optimizer_state_dict": {}}),
        ("zero1", "pytorch_model/mp_rank_00_model_states.pt", {"module": None, "param_shapes": [{}]}),
        ("zero1", "pytorch_model/mp_rank_00_model_states.pt", b"J and what follows"),
        ("zero3", "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt", torch.ones(3)),
        ("zero3", "pytorch_model/zero_pp_rank_0_mp_rank_00_model_states.pt", {"param_shapes": [{"a": (10**6,)}]}),
    ],
)
def test_an_importer_names_what_does_not_fit_together(tmp_path, capsys, name, file, content):
    shutil.copytree(made_once(save, name)[0] / "saved", tmp_path / "saved")
    target = tmp_path / "saved" / file
    if isinstance(content, bytes):
        target.write_bytes(content)
    else:
        torch.save(content, target)
    tiny_llama(tie_word_embeddings=True).config.save_pretrained(tmp_path / "model")
    command_line = ["checkpoint", "import", str(tmp_path / "saved"), str(tmp_path / "out")]
    assert main([*command_line, "--model", str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "saved") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_a_model_that_it_is_not_of_is_refused(tmp_path, capsys, name):
    config = tiny_llama().config
    config.num_hidden_layers = 5
    config.save_pretrained(tmp_path / "model")
    command_line = ["checkpoint", "import", str(made_once(save, name)[0] / "saved"), str(tmp_path / "out")]
    assert main([*command_line, "--model", str(tmp_path / "model")]) == 1
    assert "is a parameter of --model, but not in the files" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    with pytest.raises(SettingsError, match=r"--num_processes: 8 processes on this machine .* torch sees 4 GPUs on it"):
        launch._check_devices()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    launch._check_devices()


def test_what_accelerate_refuses_is_one_line(monkeypatch):
    def refuse(**_):
        raise ValueError("Expected a string path to an existing deepspeed config\nand more")

    monkeypatch.setattr(launch, "Accelerator", refuse)
    with pytest.raises(
        SettingsError,
        match=r"^the configuration of `accelerate launch` is not allowed: Expected a string path to an existing",
    ):
        launch.start_accelerator(LLMConfig())


def imported(tmp_path, groups, names):
    """Import an optimizer without names, of groups of shapes, for a model of names and shapes."""
    source = tmp_path / "saved"
    source.mkdir(exist_ok=True)
    shapes = [shape for group in groups for shape in group]
    numbers = iter(range(len(shapes)))
    optimizer = {
        "param_groups": [{"params": [next(numbers) for _ in group]} for group in groups],
        "state": {i: {"z": torch.full(shape, float(i)), "step": torch.tensor(1.0)} for i, shape in enumerate(shapes)},
    }
    torch.save(optimizer, source / "optimizer.bin")
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, source / "model.safetensors")

    def run(patterns=None):
        out = tmp_path / "out"
        import_checkpoint(source, out, parameters=[[name] for name in names], groups=patterns)
        return {
            name: int(z.flatten()[0]) for name in names for z in read_tensors(out, [f"optimizer/{name}/z"]).values()
        }

    return run


def test_states_without_names_find_their_parameters_by_groups_and_order(tmp_path):
    model = {"a.weight": (2, 3), "a.bias": (3,), "b.weight": (2, 3), "b.bias": (3,)}
    two = imported(tmp_path, [[(2, 3), (2, 3)], [(3,), (3,)]], model)
    assert two([["*.weight"], ["*"]]) == {"a.weight": 0, "a.bias": 2, "b.weight": 1, "b.bias": 3}
    for patterns, message in [
        (None, "its optimizer has 2 groups, of 2, 2 parameters; name the parameters of each, in this order"),
        ([["*"]], r"with patterns \(--group, 1 given\)"),
        (
            [["*.bias"], ["*.weight"]],
            r"a.bias has the shape \(3,\), but the state in its place in group 1 has \(2, 3\)",
        ),
        ([["*.weight", "a.bias"], ["*"]], "group 1 of its optimizer has 2 parameters, but 3 were named"),
        ([["*.weight"], ["a.*"]], "b.bias is in none of the groups"),
    ]:
        with pytest.raises(ForeignCheckpointError, match=message):
            two(patterns)
    one = imported(tmp_path, [[(2, 3), (3,), (2, 3), (3,)]], model)
    assert one() == {"a.weight": 0, "a.bias": 1, "b.weight": 2, "b.bias": 3}
    with pytest.raises(ForeignCheckpointError, match="of 3 parameters, but the model has 4"):
        imported(tmp_path, [[(2, 3), (2, 3)], [(3,)]], model)()


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    assert main(["checkpoint", "import", str(tmp_path), str(tmp_path / "out")]) == 1
    assert f"{tmp_path}: it is not what Accelerator.save_state or DeepSpeed saved" in capsys.readouterr().err


def came_up(kind, processes=2):
    return SimpleNamespace(distributed_type=kind, num_processes=processes)


@pytest.mark.parametrize(
    ("requested", "kind"),
    [
        ("deepspeed", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.MULTI_CPU),
        ("ddp", DistributedType.FSDP),
        ("zero_redundancy", DistributedType.DEEPSPEED),
        ("ddp", DistributedType.NO),
    ],
)
def test_an_engine_that_did_not_come_up_is_an_error(monkeypatch, requested, kind):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=f"{requested} was asked for, but Accelerate came up with {kind.value}"):
        launch._check_engine(requested, came_up(kind))


def test_processes_that_did_not_join_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="2 processes were launched, but Accelerate joined 1"):
        launch._check_engine("ddp", came_up(DistributedType.NO, processes=1))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "single"),
        ({"WORLD_SIZE": "2"}, "ddp"),
        ({"WORLD_SIZE": "2", "ROLE_NAME": "zero_redundancy"}, "zero_redundancy"),
        ({"WORLD_SIZE": "2", "ROLE_NAME": "default"}, "ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
    ],
)
def test_the_launch_names_the_engine(monkeypatch, variables, expected):
    for name in ("WORLD_SIZE", "ROLE_NAME", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.requested_engine() == expected


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(SettingsError, match="fsdp_version: 1 is not allowed"):
        launch.requested_engine()


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_fragments_of_a_model_that_is_not_sharded_as_launched_are_refused(kind):
    model = torch.nn.Linear(3, 2)
    optimizer = Stacey(model.parameters())
    with pytest.raises(RuntimeError, match=f"launched for {kind.value}, but the model is not sharded by it"):
        fragments(model, optimizer, came_up(kind))
