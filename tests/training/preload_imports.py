"""What a training process imports, for the server that the tests' processes are forked from."""

import os

from tests.training.hidden import HIDDEN

os.environ.update(HIDDEN)
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a device when it is imported

import accelerate.accelerator  # noqa: F401
import datasets  # noqa: F401
import deepspeed  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.resnet.modeling_resnet  # noqa: F401

import stacey_dist.training.images
import stacey_dist.training.llm
import stacey_dist.training.loop  # noqa: F401
