"""What is installed here and which kernel runs, as a report of a problem needs it: `stacey-dist info`."""

import importlib.metadata
import platform

import torch

from stacey_dist.optim import kernels
from stacey_dist.optim.kernels import NoKernelError

PACKAGES = (
    *("stacey_dist", "torch", "accelerate", "deepspeed", "transformers", "datasets"),
    *("sentencepiece", "safetensors", "triton", "wandb"),
)


def lines() -> list[str]:
    """The report, line by line."""
    found = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} is not installed")
    capability = torch.backends.cpu.get_cpu_capability()
    found.append(f"CPU: {capability}, {torch.get_num_threads()} threads")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found.append(f"GPUs: {', '.join(devices) if devices else 'none that torch sees'}")
    found += [f"kernel on {device}: {kernel(device)}" for device in ("cpu", "cuda")]
    return found


def kernel(device_type: str) -> str:
    """The kernel for a type of device, and why; or why there is none."""
    try:
        name = kernels.find(device_type).name
    except NoKernelError as error:
        return f"none, the plain rule runs: {error}"
    if device_type == "cpu":
        return f"{name}, since torch takes this processor for {torch.backends.cpu.get_cpu_capability()}"
    return name if torch.cuda.is_available() else f"{name}, but torch sees no GPU"
