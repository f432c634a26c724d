"""The networks that `transformers` does not have in the form that training needs."""

from stacey_dist.models.resnet import CifarResNet, build_resnet

__all__ = ["CifarResNet", "build_resnet"]
