"""Train in one process, as in a notebook: python notebook.py. Each part is a cell."""

# %% Build a run: of your own program, or LLM or IMAGES of stacey_dist.training.
from own_task import launcher

from stacey_dist.training import read_rows

config = launcher.parse(["--run_dir", "runs/notebook", "--train.max_steps", "40"])
built = launcher.build(config)

# %% Train some updates.
built.train(until=20)

# %% Look at the figures, and at the model.
rows = read_rows(built.run.directory / "metrics.jsonl")
print([row["loss"] for row in rows if "loss" in row])
for name, param in built.engine.module.named_parameters():
    print(f"{name}: norm {param.norm():.3f}")

# %% Train on, to the end.
checkpoint = built.train()
built.finish(checkpoint)
print(f"trained: {checkpoint}")
