"""A tiny update on the launcher's own engines, and the bytes of the tensors that it leaves on each process."""

import os
import weakref
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.training.forked import launch_environment

# Nothing divides: an odd vocabulary, 3 key-value heads; one matrix is larger than ZeRO-3 leaves whole.
SHAPE = dict(
    hidden_size=108, intermediate_size=53, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3
)  # fmt: skip
VOCABULARY = 1013


def config_of(engine, precision, tied, processes, directory):
    from stacey_dist.training.settings.llm_config import LLMConfig

    config = LLMConfig(run_dir=str(directory))
    for key, value in SHAPE.items():
        setattr(config.model, key, value)
    config.model.tie_word_embeddings = tied
    config.train.mixed_precision = precision
    config.train.global_batch_size, config.train.micro_batch_size = 2 * processes, 1
    config.train.cpu_threads = 1
    config.train.heartbeat_timeout_seconds = None  # the processes meet at a file, and no store
    config.data.sequence_length = 8
    return config


COLLECTIVES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
}


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors of each kind of collective."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d" and function._opname in COLLECTIVES:
            tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
            size = max(t.numel() * t.element_size() for t in tensors)
            if size > 128:  # the loss, flags, norms; DDP's shapes of buckets
                kind = COLLECTIVES[function._opname]
                self.bytes[kind] = self.bytes.get(kind, 0) + size
        return function(*arguments, **(keywords or {}))


class Allocations(TorchDispatchMode):
    """The most bytes that this process's tensors have at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is not torch.Tensor or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                size = storage.nbytes()
                self.storages[storage._cdata] = weakref.finalize(storage, self._free, storage._cdata, size)
                self.now += size
                self.most = max(self.most, self.now)
        return result

    def _free(self, key, size):
        del self.storages[key]
        self.now -= size


def storage_bytes(tensors):
    """Return the bytes of the distinct storages of local tensors."""
    storages = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)
    return sum(storages.values())


def measure(engine, precision, tied, directory):
    """Return bytes of weights, gradients, masters and states on this process, as the plan names them; communication."""
    from accelerate.state import AcceleratorState, GradientState

    from stacey_dist.checkpoint.snapshot import snapshot
    from stacey_dist.sharding import base_optimizer, fragments
    from stacey_dist.training import initial_weights
    from stacey_dist.training.engine import build_engine
    from stacey_dist.training.optimizers import build_optimizer
    from stacey_dist.training.processes.launch import ZERO_REDUNDANCY, requested_engine
    from stacey_dist.training.start import start
    from stacey_dist.training.tasks import llm

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    processes = dist.get_world_size() if dist.is_initialized() else 1
    config = config_of(engine, precision, tied, processes, directory)
    run = start(config)
    initial_weights._CHUNK["cpu"] = 1 << 10  # numbers on their way take less room than the model
    prepare, given = run.accelerator.prepare, {}
    run.accelerator.prepare = lambda model, *rest, **options: (
        given.update(bytes=storage_bytes(getattr(p, "ds_tensor", p) for p in model.parameters()), most=allocations.most)
        or prepare(model, *rest, **options)
    )
    with Allocations() as allocations:
        model = llm.build_model(run, SimpleNamespace(vocab_size=VOCABULARY, end_token_id=0))
        optimizer = build_optimizer(model, config.optimizer, 0, by_owner=requested_engine() == ZERO_REDUNDANCY)
        made = build_engine(run, model, optimizer)
    initial = {f.name: (f.start, f.weight.flatten().numpy().copy()) for f in fragments(made.model, made.optimizer)}
    tokens = torch.arange(8).reshape(1, 8)
    for _ in range(2 if "zero3" in engine else 1):  # ZeRO-3 learns in the first what it may leave gathered
        with Collectives() as collectives:
            for last in (False, True):
                with made.micro_batch(last):
                    logits = made.model(input_ids=tokens).logits
                    made.backward(F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()) / 4)
            found = parts(made)
            made.finish_update(torch.tensor(1.0))
    state = base_optimizer(made.optimizer).state.values()
    for name in ("z", "m"):
        found[name] = storage_bytes(values[name] for values in state)
    found["collectives"] = collectives.bytes
    found["before the engine"], found["most before the engine"] = given["bytes"], given["most"]
    found["most"], found["initial weights"] = allocations.most, initial
    ranges = snapshot(made.model, made.optimizer).ranges
    found["checkpoint"] = sum(part.values.numel() * part.values.element_size() for part in ranges.values())
    if engine == "ddp":
        sizes = made.model._get_ddp_logging_data()["bucket_sizes"]
        found["buckets"] = sum(int(size) for size in sizes.split(", "))
    return found


def parts(made):
    """Return weights, gradients and masters after a backward pass."""
    zero = getattr(made.model, "optimizer", None)
    parameters = list(made.model.parameters())
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        return {
            "weights": storage_bytes(zero.fp16_partitioned_groups_flat),
            "gradients": storage_bytes([zero.grad_partitions_flat_buffer]),
            "masters": storage_bytes(zero.fp32_partitioned_groups_flat),
            "float32 gradients": storage_bytes(f.grad for f in zero.fp32_partitioned_groups_flat if f.grad is not None),
            "gradient bucket": storage_bytes(buckets),
            "small weights": storage_bytes(p for p in parameters if p.ds_persist),
            "persistent": sum(p.ds_numel for p in parameters if p.ds_persist),
        }
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return {
            "weights": storage_bytes(zero.bit16_groups_flat),
            "gradients": storage_bytes(g for group in zero.averaged_gradients.values() for g in group),
            "masters": storage_bytes(zero.single_partition_of_fp32_groups),
        }
    return {
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes(p.grad for p in parameters),
        "masters": 0,
    }


def measure_all(rank, cases, directory):
    """Call `measure` for each (engine, precision, tied), in one group of processes; return all ranks' results."""
    found = {}
    before = dict(os.environ)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    for engine, precision, tied in cases:
        launch_as(engine, precision, processes)
        found[engine, precision, tied] = measure(engine, precision, tied, directory)
        os.environ.clear()
        os.environ.update(before)
    everyone = [found] * processes
    if processes > 1:
        dist.all_gather_object(everyone, found)
    return everyone


def launch_as(engine, precision, processes):
    """Put into the environment what `accelerate launch` would."""
    if engine == "single":
        launched = {"ACCELERATE_USE_CPU": "true"}
    else:
        launched = launch_environment(engine if engine in ("hsdp", "zero3_offload") else f"cpu_{engine}", processes)
    os.environ.update(launched, ACCELERATE_MIXED_PRECISION=precision)


def simulate(rank, processes, cases):
    """Return, for each case, the elements and bytes of state of `rank` of so many processes, on the launcher's engine.

    The other ranks are not there: torch's fake process group lets collectives return at once. It is joined once in a
    process. A case is (engine, configuration, vocabulary, whether to make an update); without an update the model is on
    the meta device, of any size.
    """
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from stacey_dist.sharding import fragments, state_bytes
    from stacey_dist.training import engine as engine_module
    from stacey_dist.training.engine import build_engine
    from stacey_dist.training.optimizers import build_optimizer
    from stacey_dist.training.processes import deepspeed_config, requests
    from stacey_dist.training.processes.launch import start_accelerator
    from stacey_dist.training.tasks import llm

    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    before, found = dict(os.environ), []
    engine_module.Agreement = lambda processes, timeout: requests.Agreement(
        1, timeout
    )  # the fake store has no group of gloo
    for engine, config, vocabulary, update in cases:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        launch_as(engine, "bf16", processes)
        accelerator = start_accelerator(config)
        run = SimpleNamespace(config=config, accelerator=accelerator, say=lambda text: None)
        run.process_batch_size, run.micro_batch_size = 2, 1
        if accelerator.distributed_type == DistributedType.DEEPSPEED and update:
            deepspeed_config.complete(run)
        with torch.device("cpu" if update else "meta"):
            model = llm.build_model(run, SimpleNamespace(vocab_size=vocabulary, end_token_id=0))
        optimizer = build_optimizer(model, config.optimizer, 0)
        if update:
            made = build_engine(run, model, optimizer)
            tokens = torch.arange(8).reshape(1, 8)
            with made.micro_batch(True):
                made.backward(made.model(input_ids=tokens).logits.float().logsumexp(-1).sum())
            made.finish_update(torch.tensor(1.0))
            model, optimizer = made.model, made.optimizer
        else:  # Accelerate would put it on the device
            model, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, False])
        count = sum(part.stop - part.start for part in fragments(model, optimizer, accelerator))
        found.append((count, state_bytes(optimizer)))
        os.environ.clear()
        os.environ.update(before)
    return found
