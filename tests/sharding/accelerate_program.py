"""Accelerate's own save_state and load_state, on whatever engine it was launched for; run by test_accelerate.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist import Stacey
from stacey_dist.checkpoint import save_checkpoint
from stacey_dist.sharding import fragments
from stacey_dist.training.processes.launch import start_accelerator
from stacey_dist.training.settings.llm_config import LLMConfig
from tests.test_docs import make_batches, tiny_llama

FROZEN = "model.layers.1.self_attn.k_proj.weight"


def make(accelerator):
    """Return a LLaMA with tied embeddings, a frozen matrix and two groups."""
    model = tiny_llama(tie_word_embeddings=True)
    model.get_parameter(FROZEN).requires_grad_(False)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config.update(train_micro_batch_size_per_gpu=4, gradient_clipping=0.5)
        plugin.deepspeed_config["zero_optimization"]["sub_group_size"] = 3000
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() == 1], "p": 4},
    ]
    return accelerator.prepare(model, Stacey(groups, lr=3e-3, p=3))


def train(accelerator, model, optimizer, batches):
    for batch in batches:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def state(accelerator, model, optimizer):
    parts = fragments(model, optimizer, accelerator)
    assert {t.dtype for f in parts for t in (f.z, f.m)} == {torch.bfloat16}
    return [t.clone() for f in parts for t in (f.weight, f.z, f.m, f.step)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def main():
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    accelerator = start_accelerator(LLMConfig(run_dir=str(directory / "run")))
    torch.set_num_threads(1)
    batches = make_batches(6, rank=accelerator.process_index)
    undisturbed = make(accelerator)
    train(accelerator, *undisturbed, batches)
    expected = state(accelerator, *undisturbed)
    accelerator.free_memory()
    saved = make(accelerator)
    train(accelerator, *saved, batches[:3])
    accelerator.save_state(str(directory / "saved"))
    save_checkpoint(directory / "ours", *saved)
    train(accelerator, *saved, batches[3:])
    assert equal(state(accelerator, *saved), expected), "saving has changed the trajectory"
    accelerator.free_memory()
    loaded = make(accelerator)
    train(accelerator, *loaded, batches[4:5])
    accelerator.load_state(str(directory / "saved"))
    train(accelerator, *loaded, batches[3:])
    assert equal(state(accelerator, *loaded), expected), "a loaded state goes another way"
    print(f"rank {os.environ.get('RANK', 0)} is as expected", flush=True)
    del undisturbed, saved, loaded
    accelerator.free_memory()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
