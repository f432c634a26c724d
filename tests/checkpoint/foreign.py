"""Small checkpoints as other programs write them, made in this process."""

import warnings

import torch
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.filesystem import FileSystemWriter

SHAPES = {"a.weight": (3, 4), "a.bias": (4,), "b.weight": (5, 2)}


def tensors():
    """Return weights and states by name; each element has a value of its own."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    weights = {name: draw(shape) for name, shape in SHAPES.items()}
    states = {
        name: {"z": draw(shape, torch.bfloat16), "m": draw(shape, torch.bfloat16), "step": torch.tensor(3.0)}
        for name, shape in SHAPES.items()
    }
    return weights, states


def save_distributed(directory, content):
    """Save as torch.distributed.checkpoint does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(content, storage_writer=FileSystemWriter(directory))


def make_fsdp2(source):
    """Save as Accelerate does with FSDP2, with entries that are no tensors."""
    weights, states = tensors()
    save_distributed(source / "pytorch_model_fsdp_0", {"model": weights})
    groups = [{"params": list(SHAPES), "lr": 0.1, "betas": (0.9, 0.99), "variant": "p2"}]
    save_distributed(source / "optimizer_0", {"optimizer": {"state": states, "param_groups": groups}})


def make_full_state(source):
    """Save as Accelerate does with FSDP2 in whole tensors, and with attributes of the state dict."""
    weights, states = tensors()
    source.mkdir(parents=True)
    torch.save(weights, source / "pytorch_model_fsdp.bin")
    torch.save({"state": states, "param_groups": [{"params": list(SHAPES)}]}, source / "optimizer.bin")


def make_zero1(source, ranks=2, gaps=None):
    """Save as DeepSpeed does with ZeRO-1 on two ranks, with so many elements between parameters."""
    weights, states = tensors()
    (source / "step3").mkdir(parents=True)
    (source / "latest").write_text("step3")

    def cut(values):
        spaces = gaps or [0] * len(values)
        flat = torch.cat([torch.nn.functional.pad(v.reshape(-1), (0, n)) for v, n in zip(values, spaces, strict=True)])
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % ranks))
        return [piece.clone() for piece in padded.chunk(ranks)]

    flat = {key: cut([states[name][key] for name in SHAPES]) for key in ("z", "m")}
    masters = cut(list(weights.values()))
    for rank in range(ranks):
        state = {key: pieces[rank] for key, pieces in flat.items()} | {"step": torch.tensor(3.0)}
        optimizer = {
            "partition_count": [ranks],
            "single_partition_of_fp32_groups": [masters[rank]],
            "base_optimizer_state": [state],
        }
        if gaps is not None:
            optimizer["param_alignment_paddings"] = [gaps]
        file = source / "step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, file)
    shapes = [{name: torch.Size(shape) for name, shape in SHAPES.items()}]
    model = {"module": {name: w.bfloat16() for name, w in weights.items()}, "param_shapes": shapes}
    torch.save(model, source / "step3" / "mp_rank_00_model_states.pt")


MAKERS = {"fsdp2": make_fsdp2, "full state": make_full_state, "zero1": make_zero1}
