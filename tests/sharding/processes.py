"""Groups of processes that each run one function: on the CPU with gloo, on GPUs with NCCL."""

import datetime
import logging
import os
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing

import tests.training.forked  # noqa: F401  # the server that processes are forked from; it hides GPUs


def spawn(function, world_size, *arguments, device="cpu"):
    """Call `function(rank, *arguments)` in `world_size` joined processes; returns rank 0's result."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (function, world_size, directory, arguments, device)
        method = "forkserver" if device == "cpu" else "spawn"
        torch.multiprocessing.start_processes(_process, arguments, nprocs=world_size, start_method=method)
        return torch.load(f"{directory}/result", weights_only=False)


def _process(rank, function, world_size, directory, arguments, device):
    torch.set_num_threads(1)
    # what DeepSpeed reads
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", DS_ACCELERATOR=device)
    logging.disable(logging.INFO)
    store = dist.FileStore(f"{directory}/store", world_size)
    timeout = datetime.timedelta(seconds=120)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    result = function(rank, *arguments)
    if rank == 0:
        torch.save(result, f"{directory}/result")
    dist.barrier()
    dist.destroy_process_group()


def outcome(function, *arguments):
    """Return None if `function` returns on all ranks, else the first rank's traceback; the same on every rank."""
    try:
        function(*arguments)
        mine = None
    except Exception:
        mine = traceback.format_exc()
        print(mine, file=sys.stderr, flush=True)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return next((text for text in everyone if text is not None), None)
