"""ResNets: the published shapes and initial weights, and batch norms that stay in float32."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ResNetForImageClassification

from stacey_dist.models import CifarResNet, build_resnet
from stacey_dist.models.resnet import BatchNorm

CLASSES = [f"class {i}" for i in range(10)]


def bottleneck_shapes(blocks):
    """Return the weights' shapes as He et al. (2016), table 1, describe ResNet-50 and deeper."""
    shapes, channels = [(64, 3, 7, 7)], 64
    for stage, count in enumerate(blocks):
        inner, outer = 64 * 2**stage, 256 * 2**stage
        for block in range(count):
            if block == 0:
                shapes.append((outer, channels, 1, 1))
            shapes += [(inner, channels, 1, 1), (inner, inner, 3, 3), (outer, inner, 1, 1)]
            channels = outer
    return [*shapes, (1000, channels)]


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return build_resnet(50, [str(i) for i in range(1000)])


def test_resnet50_is_the_published_network(resnet50):
    weights = [p for p in resnet50.parameters() if p.dim() > 1]
    assert sorted(tuple(w.shape) for w in weights) == sorted(bottleneck_shapes([3, 4, 6, 3]))
    assert sum(p.numel() for p in resnet50.parameters()) == 25_557_032  # torchvision's resnet50
    strides = [m.stride for m in resnet50.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert strides == [(2, 2)] * 7  # the stem, and three stages with a shortcut and a 3x3 convolution each
    assert all(
        m.kernel_size == (3, 3) or m.kernel_size == (7, 7) or m.in_channels * 2 == m.out_channels
        for m in resnet50.modules()
        if isinstance(m, nn.Conv2d) and m.stride != (1, 1)
    )  # the stride of a bottleneck is with its 3x3 convolution, as in torchvision


def test_initial_weights_have_the_published_distribution(resnet50):
    for module in resnet50.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected, count = math.sqrt(2 / fan_out), module.weight.numel()
            # Standard errors of a normal sample's mean and deviation; five of them, for 53 convolutions.
            assert module.weight.mean().item() == pytest.approx(0, abs=5 * expected / math.sqrt(count))
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            assert 0.99 * bound < module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_residual_begins_with_shortcuts_alone(depth):
    model = build_resnet(depth, CLASSES, width=8, zero_init_residual=True)
    blocks = [block for stage in model.resnet.encoder.stages for block in stage.layers]
    x = {block: torch.randn(2, next(block.layer[0].parameters()).shape[1], 8, 8) for block in blocks}
    for block in blocks:
        assert torch.equal(block(x[block]), torch.relu(block.shortcut(x[block])))
    zeros = sum(int((p == 0).all()) for n, p in model.named_parameters() if n.endswith("normalization.weight"))
    assert zeros == len(blocks)


def test_the_cifar_form_keeps_the_resolution_of_its_images():
    model = build_resnet(18, CLASSES, stem="cifar")
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # ResNet-18 as CIFAR's literature has it
    stem = model.resnet.embedder(torch.randn(1, 3, 32, 32))
    assert stem.shape == (1, 64, 32, 32)
    assert model.resnet(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 512, 4, 4)
    weight = stem_weight = model.resnet.embedder.embedder.convolution.weight
    assert stem_weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=5 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize(("stem", "loads"), [("cifar", CifarResNet), ("imagenet", AutoModelForImageClassification)])
def test_it_is_saved_and_loaded(tmp_path, stem, loads):
    model = build_resnet(18, CLASSES, stem=stem, width=8).eval()
    model.save_pretrained(tmp_path)
    loaded = loads.from_pretrained(tmp_path).eval()
    assert type(loaded) is (CifarResNet if stem == "cifar" else ResNetForImageClassification)
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_batch_norm_is_torchs():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(5), nn.BatchNorm2d(5)
    for _ in range(3):
        x = torch.randn(4, 5, 3, 3) * 3 + 1
        assert torch.equal(ours(x), theirs(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), theirs(x))


def test_batch_norm_with_bfloat16_weights_keeps_float32_statistics():
    torch.manual_seed(0)
    exact, cast = BatchNorm(5), BatchNorm(5)
    for parameter in cast.parameters():
        parameter.data = parameter.data.bfloat16()
    x = (torch.randn(64, 5, 3, 3) * 3 + 1).bfloat16()
    y = cast(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact(x))
    assert cast.running_mean.dtype == torch.float32
    assert torch.equal(cast.running_mean, exact.running_mean)
    y.float().square().sum().backward()
    assert cast.weight.grad.dtype == torch.bfloat16
