"""Default hyperparameters of each optimizer, measured in short runs of the launchers' models.

Launchers, sweeps and the documentation use them. `docs/results/notebook.md` has the runs.
"""

from collections.abc import Mapping
from typing import Any

Defaults = Mapping[str, Mapping[str, Any]]
"""By `method`, every number that an optimizer reads."""

TEXT: Defaults = {
    "stacey p2": dict(lr=0.0012, weight_decay=0.1, p=30.0, alpha=1.0, tau=0.004, betas=(0.5, 0.7)),
    "stacey pp": dict(lr=0.0012, weight_decay=0.1, p=30.0, alpha=0.00123, tau=5.5e-5, betas=(0.5, 0.7)),
    "stacey 2p": dict(lr=0.4, weight_decay=0.0, p=10.0, alpha=0.00123, tau=1e-5, betas=(0.8, 0.9)),
    "lp_descent": dict(lr=0.0012, weight_decay=0.1, p=30.0),
    "adamw": dict(lr=0.003, weight_decay=0.1, betas=(0.8, 0.95)),
    "adam": dict(lr=0.0016, weight_decay=0.00015, betas=(0.8, 0.95)),
    "lion": dict(lr=0.0012, weight_decay=0.1, betas=(0.5, 0.7)),
    "sgd": dict(lr=0.37, weight_decay=0.0, momentum=0.8),
    "ademamix": dict(lr=0.0015, weight_decay=0.1, alpha=2.0, betas=(0.8, 0.95), beta3=0.99),
    "muon": dict(lr=0.003, adamw_lr=0.003, weight_decay=0.1, momentum=0.95, betas=(0.8, 0.95)),
}
"""LLaMA, 1.3 M parameters: the quickstart of `train_llm.py`."""

IMAGES: Defaults = {
    "stacey p2": dict(lr=0.0133, weight_decay=0.001, p=6.0, alpha=0.85, tau=0.038, betas=(0.9, 0.99)),
    "stacey pp": dict(lr=0.337, weight_decay=0.001, p=2.5, alpha=0.075, tau=0.00428, betas=(0.9, 0.99)),
    "stacey 2p": dict(lr=4.43, weight_decay=0.001, p=2.0, alpha=0.0193, tau=0.000156, betas=(0.9, 0.95)),
    "lp_descent": dict(lr=0.1, weight_decay=0.001, p=2.5),
    "adamw": dict(lr=0.00205, weight_decay=0.0879, betas=(0.9, 0.99)),
    "adam": dict(lr=0.00223, weight_decay=1.2e-6, betas=(0.9, 0.95)),
    "lion": dict(lr=0.000745, weight_decay=0.00349, betas=(0.8, 0.9)),
    "sgd": dict(lr=0.0745, weight_decay=0.000182, momentum=0.9),
}
"""ResNet-18 of width 16, 400 updates on CIFAR-10; `train_imagenet.py` has that network as its quickstart. A ResNet has
no hidden matrices for muon."""

_UNREAD: Mapping[str, Any] = {"momentum": 0.9, "adamw_lr": None, "beta3": None}
NAMES = tuple(dict.fromkeys(name for numbers in TEXT.values() for name in numbers))
"""The settings that some optimizer has a number of its own for."""


def method(name: str, variant: str) -> str:
    """Return what an optimizer's numbers are found by: its name, for stacey with the variant."""
    return f"{name} {variant}" if name == "stacey" else name


def completed(defaults: Defaults, of_method: str) -> dict[str, Any]:
    """Return the numbers that an optimizer begins from, and some for those that it does not read."""
    return {**_UNREAD, **defaults["stacey p2"], **defaults.get(of_method, {})}
