"""Figures 4, 5 and 11 to 13 of the paper: pretraining LLaMA."""

from functools import partial

from experiments.comparison import PAPER_OPTIMIZERS, Size, Task, compare
from experiments.framework import Experiment, Scale

TASK = Task("train_llm.py", "eval_loss")
_VARY_P = {"stacey_p2": (2.8, 8, 30, 1000), "stacey_pp": (2.8, 8, 30)}
_SMALL = Size(
    optimizers=(*PAPER_OPTIMIZERS, "stacey_p2_scheduled"),
    sweeps="sweeps/llm",
    trials=8,
    vary_p=_VARY_P,
)
LARGE = Size(
    optimizers=(*PAPER_OPTIMIZERS, "stacey_p2_scheduled"),
    sweeps="sweeps/llm",
    trials=8,
    overrides={
        "model.hidden_size": 640,
        "model.intermediate_size": 1708,
        "model.num_hidden_layers": 12,
        "model.num_attention_heads": 10,
        "data.sequence_length": 1024,
        "tokenizer.vocab_size": 32100,
        "schedule.warmup_steps": 500,
        "train.max_steps": 5000,
        "train.eval_every_steps": 250,
        "train.mixed_precision": "bf16",
    },
    without_data={
        "data.dataset": "allenai/c4",
        "data.dataset_config": "en",
        "data.max_tokens": 82_000_000,  # what 5 000 updates read, once
        "tokenizer.name": "t5-base",
    },
    vary_p=_VARY_P,
)
_PAPER = Size(
    optimizers=PAPER_OPTIMIZERS,
    configs="llm/llama_100m_c4_{}_paper.yaml",
    vary_p=dict.fromkeys(("stacey_p2", "stacey_pp"), (2.2, 2.5, 2.8, 3, 3.5)),
)

EXPERIMENT = Experiment(
    "llm",
    "figures 4, 5, 11 to 13: LLaMA with every optimizer of the paper",
    {
        "cpu": Scale("0.9 M parameters, 600 updates, 8 runs to tune each; 80 minutes, two cores", 3, {"size": _SMALL}),
        "gpu": Scale("100 M parameters, 5 000 updates, 8 runs to tune each; hours on one GPU", 3, {"size": LARGE}),
        "paper": Scale("the same on C4, the paper's settings, nothing tuned; an hour on one GPU", 2, {"size": _PAPER}),
    },
    partial(compare, TASK),
    files=("sweeps/llm/*.yaml", "llm/llama_100m_c4_*_paper.yaml"),
)
