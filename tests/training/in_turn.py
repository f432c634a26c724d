"""train_llm.py several times in one process, or one group of processes: RUNS is a JSON file of lists of options.

Beside each run's directory, DIRECTORY.RANK.pt has the process's initial weights by name, and the classes of the modules
that FSDP2 shards.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist.sharding import fragments
from stacey_dist.training import loop
from stacey_dist.training.launchers import LLM

PartialState.destroy_process_group = lambda self, group=None: None
train = loop.train


def record_and_train(run, task, engine, **options):
    weights = {f.name: (f.start, f.weight.float().clone()) for f in fragments(engine.model, engine.optimizer)}
    sharded = {type(m).__name__ for m in engine.module.modules() if isinstance(m, FSDPModule)}
    torch.save([weights, sorted(sharded)], f"{run.directory}.{run.accelerator.process_index}.pt")
    return train(run, task, engine, **options)


loop.train = record_and_train
for options in json.loads(Path(os.environ["RUNS"]).read_text()):
    LLM.run(LLM.parse(options))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
