"""train_llm.py as it runs on a GPU, on the CPU: Triton's kernel, interpreted, and a count of host reads in each update.

The third and sixth updates have a loss that is not finite; the fifth a gradient. COUNT=FILE appends the reads of each
update to FILE.RANK, with the lines that called them. PLAIN=1 is a usual run on the CPU, in which nothing is counted.
"""

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it as it is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from stacey_dist.optim import base
from stacey_dist.optim.kernels import triton
from stacey_dist.training import engine, loop
from stacey_dist.training.launchers import LLM
from stacey_dist.training.tasks import llm

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
found = []


def note(name):
    ours = [frame for frame in traceback.extract_stack() if "/stacey_dist/" in frame.filename][-1]
    found.append(f"{name} called by {ours.filename}:{ours.lineno}: {ours.line}")


class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            note(func)
        return func(*args, **(kwargs or {}))


class Interpreted(triton.TritonKernel):
    def __call__(self, rows, call):
        launch = self._prepare(rows, [row.weight.data_ptr() for row in rows], call)
        with _disable_current_modes():  # the interpreter is the device
            launch()


class BadUpdates(llm.LanguageModeling):
    def micro_batches(self, position):
        self.update = position // self.batch_size + 1
        return super().micro_batches(position)

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if self.update == 5:  # a finite loss whose gradient is not
            return loss + 0.0 * (loss - loss.detach()).abs().sqrt()
        return loss + torch.nan if self.update in (3, 6) else loss


def counted(original):
    def train_step(trainer):
        found.clear()
        with Count():
            return original(trainer)

    return train_step


def reported(original, path):
    def after_step(trainer, requests):
        with Count():
            original(trainer, requests)
        with open(path, "a") as file:
            file.write(json.dumps([trainer.progress.step, found]) + "\n")

    return after_step


def main():
    if "PLAIN" not in os.environ:
        triton.BLOCK = 2**12  # fewer, longer operations of the interpreter
        kernel = Interpreted()
        base.kernel = lambda device_type: kernel
        engine.Engine._kernel_runs_on_gpu = lambda self: True
        tolist = torch.Tensor.tolist
        torch.Tensor.tolist = lambda tensor: (note("tolist"), tolist(tensor))[1]  # dispatches nothing on a CPU
        path = f"{os.environ['COUNT']}.{os.environ.get('RANK', '0')}"
        loop._Trainer.train_step = counted(loop._Trainer.train_step)
        loop._Trainer.after_step = reported(loop._Trainer.after_step, path)
    replace(LLM, load_parts=lambda: replace(llm.PARTS, task=BadUpdates)).main()


if __name__ == "__main__":
    main()
