"""Three updates of a launcher on the meta device. A tensor on another device, or a read by the host, is an error there.

The last argument is the launcher's program. Only Stacey's kernel is replaced: by one that looks at where tensors are.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from accelerate import Accelerator

from stacey_dist.optim import base
from stacey_dist.training import engine, loop
from stacey_dist.training.launchers import LAUNCHERS
from stacey_dist.training.progress import Progress

META = torch.device("meta")
seen = set()


def kernel(rows, call):
    """Stand in for the GPU's kernel: remember where the tensors are that it is given."""
    found = [*(value for row in rows for value in row), call.found_inf, call.grad_scale]
    seen.update(value.device for value in found if value is not None)


def build_model_there(build_model):
    def build(run, data):
        Accelerator.device = META
        return build_model(run, data).to(META)

    return build


def main():
    launcher = LAUNCHERS[sys.argv.pop()]
    base.kernel = lambda device_type: kernel
    base.kernels.launch_key = lambda row: row.weight.dtype
    engine.Engine._kernel_runs_on_gpu = lambda self: True
    parts = launcher.load_parts()
    parts = replace(parts, build_model=build_model_there(parts.build_model))
    built = replace(launcher, load_parts=lambda: parts).build(launcher.parse())
    built.run.resolve_max_steps(built.task.samples_per_epoch, 0, 0)
    trainer = loop._Trainer(built.run, built.task, built.engine, Progress(), (), None)
    for _ in range(3):
        trainer.train_step()
    assert [outcome.device for outcome in trainer.outcomes._unread] == [META] * 3
    assert seen == {META}
    built.task.close()
    print("three updates on the meta device")


if __name__ == "__main__":
    main()
