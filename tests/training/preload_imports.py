"""What a training process imports, for the server that the tests' processes are forked from."""

import atexit
import gc
import os

from tests.training.hidden import HIDDEN

os.environ.update(HIDDEN)
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a device when it is imported

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # what deepspeed.initialize imports: torch._inductor
import torch.distributed.checkpoint  # noqa: F401

import experiments.trial_process  # noqa: F401

# What is loaded stays: else every collection in every process goes through all of it, and copies its pages.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
