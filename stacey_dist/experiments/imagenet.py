"""Tables 2 and 4, figures 3 and 8 to 10 of the paper: ResNet-50 on ImageNet."""

from functools import partial

from stacey_dist.experiments.cifar import DIGITS, TASK
from stacey_dist.experiments.comparison import Size, compare
from stacey_dist.experiments.framework import Experiment, Scale

_OPTIMIZERS = ("sgd", "stacey_p2", "stacey_pp", "stacey_2p")  # those of the paper's tables
_SMALL = Size(
    optimizers=_OPTIMIZERS,
    sweeps="sweeps/cifar",
    trials=8,
    overrides={"model.depth": 50, "model.width": 8, "model.stem": "imagenet"},
    without_data=DIGITS,
    vary_p=dict.fromkeys(("stacey_p2", "stacey_pp", "stacey_2p"), (2, 2.8, 6)),
)
_PAPER = Size(optimizers=_OPTIMIZERS, configs="imagenet/resnet50_{}.yaml")

EXPERIMENT = Experiment(
    "imagenet",
    "tables 2, 4, figures 3, 8 to 10: ResNet-50 on ImageNet",
    {
        "cpu": Scale(
            "an eighth of the width, 400 updates of 64, 8 runs to tune each; 20 minutes on two slow cores; "
            "digits unless --data names images",
            2,
            {"size": _SMALL},
        ),
        "paper": Scale("90 epochs with the paper's settings, nothing tuned; weeks on one GPU", 2, {"size": _PAPER}),
    },
    partial(compare, TASK),
    trains=True,
    files=("sweeps/cifar/*.yaml", "imagenet/resnet50_*.yaml"),
)
