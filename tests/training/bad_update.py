"""train_llm.py with a third update whose loss is not finite, though its gradients are, on the last process."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist.training.launchers import LLM
from stacey_dist.training.tasks import llm


class BadUpdate(llm.LanguageModeling):
    def micro_batches(self, position):
        accelerator = self.run.accelerator
        self.bad = position == 2 * self.batch_size and accelerator.process_index == accelerator.num_processes - 1
        return super().micro_batches(position)

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return loss + torch.inf if self.bad else loss


if __name__ == "__main__":
    replace(LLM, load_parts=lambda: replace(llm.PARTS, task=BadUpdate)).main()
