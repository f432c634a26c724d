"""The same training step on each engine, as a program without Accelerate sets it up."""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from stacey_dist.sharding import base_optimizer

os.environ.setdefault("DS_ACCELERATOR", "cpu")

# fully_shard of torch 2.6 needs a GPU; tests whose names have an engine with it are skipped with that reason.
FULLY_SHARD = hasattr(torch.cpu.Stream, "record_event")
ENGINES = ("ddp", "zero_redundancy", "zero0", "zero1", "zero2", "zero3", "fsdp2", "hsdp")


def that_run(*engines):
    """Those of the engines that run here."""
    return [engine for engine in engines if FULLY_SHARD or engine not in ("fsdp2", "hsdp")]


TAKES_SCALARS = ("ddp", "zero_redundancy")  # fully_shard and DeepSpeed refuse parameters of no dimension


def device_type():
    """Where the processes of this group compute."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


class Trainer:
    """A model and its optimizer on an engine; `step` makes one update from the loss of this rank."""

    def __init__(self, engine, model, make_groups, optimizer_class, settings, **options):
        self.engine = engine
        model.to(device_type())
        build = self._zero if self.is_deepspeed else getattr(self, f"_{engine}")
        build(model, make_groups, optimizer_class, settings, **options)

    def step(self, *inputs):
        """Returns this rank's loss."""
        loss = self.model(*inputs)
        if self.is_deepspeed:
            self.model.backward(loss)
            self.model.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    @property
    def is_deepspeed(self):
        return self.engine.startswith("zero") and self.engine[4:].isdigit()

    @property
    def scheduled(self):
        """What a learning-rate schedule sets."""
        return self.optimizer if isinstance(self.optimizer, ZeroRedundancyOptimizer) else base_optimizer(self.optimizer)

    def _single(self, model, make_groups, optimizer_class, settings):
        self.model = model
        self.optimizer = optimizer_class(make_groups(model), **settings)

    def _ddp(self, model, make_groups, optimizer_class, settings):
        self.model = DistributedDataParallel(model)
        self.optimizer = optimizer_class(make_groups(model), **settings)

    def _zero_redundancy(self, model, make_groups, optimizer_class, settings):
        self.model = DistributedDataParallel(model)
        self.optimizer = ZeroRedundancyOptimizer(make_groups(model), optimizer_class, **settings)

    def _zero(self, model, make_groups, optimizer_class, settings, **sections):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,  # without it, DeepSpeed clips at 1.0
            "optimizer": {"type": optimizer_class.__name__, "params": settings},
            "zero_optimization": {
                "stage": int(self.engine[-1]),
                "reduce_bucket_size": 4000,
                "allgather_bucket_size": 4000,
                "sub_group_size": 3000,
                "stage3_param_persistence_threshold": 20,
                **sections.pop("zero_optimization", {}),
            },
            **sections,
        }
        # The groups' own settings stand in the program, the others in the JSON.
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=make_groups(model), config=config
        )

    def _fsdp2(self, model, make_groups, optimizer_class, settings, mesh=None, **policy):
        mesh = mesh or dist.init_device_mesh(device_type(), (dist.get_world_size(),))
        fully_shard(model.large, mesh=mesh, **policy)
        fully_shard(model, mesh=mesh, **policy)
        self.model = model
        self.optimizer = optimizer_class(make_groups(model), **settings)

    def _hsdp(self, model, make_groups, optimizer_class, settings):
        world = dist.get_world_size()
        shape = (2, world // 2) if world % 2 == 0 else (1, world)
        mesh = dist.init_device_mesh(device_type(), shape, mesh_dim_names=("replicate", "shard"))
        self._fsdp2(model, make_groups, optimizer_class, settings, mesh=mesh)


def gather(fragments):
    """All ranks' fragments put together: {name: (weight, {key: state})} as whole tensors.

    Asserts that the copies that count cover each element exactly once, and that replicas are equal to them.
    """
    mine = [
        (f.name, tuple(f.shape), f.start, f.stop, f.replica, f.weight.reshape(-1).cpu(),
         {k: v.reshape(-1).cpu() for k, v in f.state.items()}, None if f.step is None else float(f.step))
        for f in fragments
    ]  # fmt: skip
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    pieces = sorted((piece for rank in everyone for piece in rank), key=lambda piece: (piece[4], piece[0], piece[2]))
    result = {}
    for replica in sorted({piece[4] for piece in pieces}):
        whole = {}
        for name in {piece[0] for piece in pieces}:
            parts = [piece for piece in pieces if piece[0] == name and piece[4] == replica]
            position = 0
            for _, _, start, stop, _, weight, state, _ in parts:
                assert start == position < stop, f"{name}: {start} after {position}"
                assert weight.numel() == stop - start
                assert all(value.numel() == stop - start for value in state.values())
                position = stop
            if not parts:
                assert replica > 0, name  # its owner alone has it
                continue
            shape = parts[0][1]
            assert position == torch.Size(shape).numel(), f"{name}: {position} of {shape}"
            assert len({piece[7] for piece in parts}) == 1
            state = {k: torch.cat([piece[6][k] for piece in parts]).reshape(shape) for k in parts[0][6]}
            whole[name] = (torch.cat([p[5] for p in parts]).reshape(shape), state | {"step": parts[0][7]})
        if replica == 0:
            result = whole
        for name, (weight, state) in whole.items():
            assert torch.equal(weight, result[name][0]), name
            assert state.keys() == result[name][1].keys()
            assert all(equal(value, result[name][1][key]) for key, value in state.items()), name
    return result


def equal(a, b):
    return torch.equal(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))


def assert_equal(ours, expected):
    """Weights, states and steps are the same to the bit, and states have the same dtype."""
    assert ours.keys() == expected.keys()
    for name, (weight, state) in expected.items():
        our_weight, our_state = ours[name]
        assert torch.equal(our_weight, weight), f"{name}: {int((our_weight != weight).sum())} weights differ"
        assert our_state.keys() == state.keys(), name
        for key, value in state.items():
            assert equal(our_state[key], value), f"{name}: {key} differs"
            if key != "step":
                assert our_state[key].dtype == value.dtype, f"{name}: {key}"
