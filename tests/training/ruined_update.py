"""train_llm.py with an update that ruins one element of a state or weight, on the last process.

RUIN="STEP KIND": after the update of this number one element of KIND is NaN. It is a key of the optimizer's state,
"weight", or "none". Later losses are not finite, though their gradients are; with RECOVER=STEP only up to this update.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist.sharding import fragments
from stacey_dist.training import engine
from stacey_dist.training.launchers import LLM
from stacey_dist.training.tasks import llm

ruined_step, kind = os.environ.get("RUIN", "0 none").split()
recover = int(os.environ.get("RECOVER", "1000000"))
last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
updates = [0]


class RuinedLoss(llm.LanguageModeling):
    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return loss + torch.nan if last and int(ruined_step) <= updates[0] < recover else loss


def finish_update(original):
    def finish(self, *arguments):
        updates[0] += 1
        update = original(self, *arguments)
        if updates[0] == int(ruined_step) and kind != "none" and last:
            for fragment in fragments(self.model, self.optimizer):
                flat = fragment.weight if kind == "weight" else fragment.state[kind]
                with torch.no_grad():
                    flat.reshape(-1)[-1:].fill_(torch.nan)
        return update

    return finish


if __name__ == "__main__":
    engine.Engine.finish_update = finish_update(engine.Engine.finish_update)
    replace(LLM, load_parts=lambda: replace(llm.PARTS, task=RuinedLoss)).main()
