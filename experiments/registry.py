"""The experiments by their names."""

from experiments import ablation, alpha, cifar, coupling, imagenet, llm, long, synthetic, theorem
from experiments.framework import Experiment
from stacey_dist.errors import unknown

_MODULES = (synthetic, theorem, cifar, imagenet, llm, long, alpha, coupling, ablation)
EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in _MODULES}


def find(name: str) -> Experiment:
    """Return the experiment of that name; SettingsError if there is none."""
    if name not in EXPERIMENTS:
        raise unknown("reproduce", name, ["list", *EXPERIMENTS], spelled=name.lower(), cutoff=0.5)
    return EXPERIMENTS[name]


def lines() -> list[str]:
    """Return what there is to reproduce, and at which scales; the first is what is run if none is asked for."""
    shown = []
    for experiment in EXPERIMENTS.values():
        shown.append(f"{experiment.name}: {experiment.description}")
        for name, scale in experiment.scales.items():
            shown.append(f"  --scale {name}: {scale.description}; --seeds {scale.seeds}")
    return shown
