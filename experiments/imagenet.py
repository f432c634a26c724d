"""Tables 2 and 4, figures 3 and 8 to 10 of the paper: ResNet-50 on ImageNet."""

from functools import partial

from experiments.cifar import DIGITS, TASK
from experiments.comparison import Size, compare
from experiments.framework import Experiment, Scale

_OPTIMIZERS = ("sgd", "stacey_p2", "stacey_pp", "stacey_2p")  # those of the paper's tables
_SMALL = Size(
    optimizers=_OPTIMIZERS,
    sweeps="sweeps/cifar",
    trials=8,
    overrides={"model.depth": 50, "model.width": 8, "model.stem": "imagenet"},
    without_data=DIGITS,
    vary_p=dict.fromkeys(("stacey_p2", "stacey_pp", "stacey_2p"), (2, 2.8, 6)),
)
_LARGE = Size(
    optimizers=_OPTIMIZERS,
    sweeps="sweeps/cifar",
    trials=8,
    overrides={
        "model.depth": 50,
        "model.width": 64,
        "model.stem": "imagenet",
        "data.image_size": 128,
        "data.crop": "random_resized",
        "data.eval_resize": 146,
        "data.mean": [0.485, 0.456, 0.406],
        "data.std": [0.229, 0.224, 0.225],
        "data.cache": "none",  # decoded, ImageNet takes hundreds of GB
        "schedule.warmup_steps": 1000,
        "train.global_batch_size": 256,
        "train.epochs": 16,
        "train.eval_every_steps": 5005,  # an epoch of ImageNet
        "train.mixed_precision": "bf16",
    },
    without_data={"data.path": None, "data.dataset": "ILSVRC/imagenet-1k"},
    vary_p=_SMALL.vary_p,
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
        "gpu": Scale("16 epochs of images of 128 pixels, 8 runs to tune each; weeks on one GPU", 2, {"size": _LARGE}),
        "paper": Scale("90 epochs with the paper's settings, nothing tuned; weeks on one GPU", 2, {"size": _PAPER}),
    },
    partial(compare, TASK),
    files=("sweeps/cifar/*.yaml", "imagenet/resnet50_*.yaml"),
)
