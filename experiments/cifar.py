"""Tables 1 and 3, figures 2, 6 and 7 of the paper: ResNet-18 on CIFAR-10."""

from functools import partial

from experiments.comparison import PAPER_OPTIMIZERS, Size, Task, compare
from experiments.framework import Experiment, Scale

TASK = Task("train_imagenet.py", "eval_top1")
DIGITS = {
    "data.path": None,
    "data.image_size": 28,
    "data.flip": False,
    "data.mean": [0.1307, 0.1307, 0.1307],
    "data.std": [0.3081, 0.3081, 0.3081],
}
_VARIANTS = ("stacey_p2", "stacey_pp", "stacey_2p")
_VARY_P = dict.fromkeys(_VARIANTS, (2, 2.8, 6))
_TUNED = (*PAPER_OPTIMIZERS, "stacey_p2_tau")
_SMALL = Size(optimizers=_TUNED, sweeps="sweeps/cifar", trials=8, without_data=DIGITS, vary_p=_VARY_P)
_LARGE = Size(
    optimizers=_TUNED,
    sweeps="sweeps/cifar",
    trials=12,
    overrides={
        "model.width": 64,
        "train.global_batch_size": 128,
        "train.epochs": 30,
        "train.eval_every_steps": 391,
        "train.mixed_precision": "bf16",
    },
    without_data={"data.path": None, "data.dataset": "uoft-cs/cifar10", "data.dataset_validation_split": "test"},
    vary_p=_VARY_P,
)
_PAPER = Size(
    optimizers=PAPER_OPTIMIZERS,
    configs="imagenet/cifar10_{}.yaml",
    vary_p=dict.fromkeys(_VARIANTS, (2, 2.2, 2.8, 3.5, 6)),
)

EXPERIMENT = Experiment(
    "cifar",
    "tables 1, 3, figures 2, 6, 7: ResNet-18 on CIFAR-10 with every optimizer of the paper",
    {
        "cpu": Scale(
            "a quarter of the width, 400 updates of 64, 8 runs to tune each; 70 minutes on two cores; "
            "digits unless --data names CIFAR",
            3,
            {"size": _SMALL},
        ),
        "gpu": Scale("30 epochs, 12 runs to tune each; a day on one GPU", 3, {"size": _LARGE}),
        "paper": Scale("200 epochs with the paper's settings, nothing tuned; days on one GPU", 3, {"size": _PAPER}),
    },
    partial(compare, TASK),
    files=("sweeps/cifar/*.yaml", "imagenet/cifar10_*.yaml"),
)
