"""ResNets: those of `transformers`, and their form for small images."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

# By depth: the kind of the blocks, how many there are in each stage, and how many times as wide their outputs are.
_SHAPES: dict[int, tuple[str, list[int], int]] = {
    18: ("basic", [2, 2, 2, 2], 1),
    34: ("basic", [3, 4, 6, 3], 1),
    50: ("bottleneck", [3, 4, 6, 3], 4),
    101: ("bottleneck", [3, 4, 23, 3], 4),
    152: ("bottleneck", [3, 8, 36, 3], 4),
}


class CifarResNet(ResNetForImageClassification):
    """A ResNet for images of about 32 pixels: its stem is a 3x3 convolution, without stride and without pooling."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(
            config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False
        )
        stem.pooler = nn.Identity()
        self._init_weights(stem.embedder.convolution)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization in float32, whatever the engine casts the weights to.

    torch takes float32 statistics with float32 weights only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize activations of shape (n, channels, height, width), in their dtype."""
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight.float(), self.bias.float()
        return F.batch_norm(input, mean, var, weight, bias, self.training, self.momentum, self.eps)


def build_resnet(
    depth: int, classes: list[str], *, stem: str = "imagenet", width: int = 64, zero_init_residual: bool = False
) -> Any:
    """Return a ResNet with random weights (He's initialization, as torchvision's): 25 557 032 of them at depth 50.

    Args:
        depth: 18, 34, 50, 101 or 152.
        classes: the names of the classes.
        stem: "imagenet", a 7x7 convolution with stride 2 and a pooling, or "cifar", see `CifarResNet`.
        width: channels of the stem; everything else is wider by the usual factors.
        zero_init_residual: set the weights of each block's last batch norm to 0, so that a block adds nothing at first.
    """
    kind, depths, expansion = _SHAPES[depth]
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width * expansion * 2**stage for stage in range(4)],
        depths=depths,
        layer_type=kind,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
    )
    model: Any = (CifarResNet if stem == "cifar" else ResNetForImageClassification)(config)
    # Accelerate asks a model of transformers for its embeddings, and FSDP2 gathers one stage at a time: transformers
    # names its single convolutions.
    model.get_input_embeddings = _no_embeddings
    model._no_split_modules = ["ResNetStage"]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = BatchNorm
    if zero_init_residual:
        for stage in model.resnet.encoder.stages:
            for block in stage.layers:
                nn.init.zeros_(block.layer[-1].normalization.weight)
    return model


def _no_embeddings() -> None:
    """Return None, in place of embeddings."""
