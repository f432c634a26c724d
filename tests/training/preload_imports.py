"""What a training process imports, for the server that the tests' processes are forked from."""

import os

from tests.training.hidden import HIDDEN

os.environ.update(HIDDEN)
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a device when it is imported

import deepspeed  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

import stacey_dist.experiments.trial_process  # noqa: F401
