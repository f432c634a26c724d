"""What a training process imports, for the server that the tests' processes are forked from."""

import atexit
import gc
import os

from tests.training.hidden import HIDDEN

os.environ.update(HIDDEN)
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a device when it is imported

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # what deepspeed.initialize imports: torch._inductor
import sentencepiece.sentencepiece_model_pb2  # noqa: F401  # what saving a tokenizer imports
import torch.distributed.checkpoint  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import experiments.trial_process  # noqa: F401
from stacey_dist.training.launchers import LAUNCHERS
from stacey_dist.training.processes.launch import skip_compilation
from stacey_dist.training.reports import requested

# What each process would make for itself, half of a short run's time: parsers, and a table of transformers.
for launcher in LAUNCHERS.values():
    launcher.parse([])
# Drawing takes a quarter of a short run, and no test looks at the pictures of these processes.
requested.draw_losses = lambda training: (training.run.directory / "loss.png").write_bytes(b"a picture")
get_checkpoint_conversion_mapping("llama")
# For the programs here that use DeepSpeed without a launcher. What DeepSpeed can compile is looked for once.
skip_compilation()

# What is loaded stays: else every collection in every process goes through all of it, and copies its pages.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
