"""Report what is installed here, what runs, and what installs the rest: `stacey-dist info`, for bug reports."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist

from stacey_dist.cores import available_cores
from stacey_dist.extras import install_line
from stacey_dist.optim import kernels
from stacey_dist.optim.kernels import NoKernelError

PACKAGES = (
    *("stacey_dist", "torch", "accelerate", "deepspeed", "transformers", "datasets"),
    *("sentencepiece", "safetensors", "triton", "wandb"),
)
# Settings that change how processes find each other. Nothing else of the environment is shown.
_ENVIRONMENT = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_ELASTIC_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def print_info() -> int:
    """Print what a report of a problem needs."""
    found = [f"Python {platform.python_version()} on {platform.platform()}"]
    found += [f"{package} {_version(package) or _how_to_install(package)}" for package in PACKAGES]
    capability = torch.backends.cpu.get_cpu_capability()
    found.append(f"CPU: {capability}, {torch.get_num_threads()} threads, {available_cores()} cores for this process")
    found += _gpus()
    how_to = "apt-get install g++, or the like; then install stacey_dist again"
    found.append(f"compiler: {_compiler() or f'none; {how_to}'}")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found += [f"kernel on {device}: {_kernel(device)}" for device in devices]
    backends, lacking = ", ".join(_backends()), "this torch was built without distributed"
    found.append(f"processes talk over: {backends or f'nothing: {lacking}'}")
    joined = "yes" if backends else f"no: {lacking}"
    with_deepspeed = joined if _version("deepspeed") else f"no: {install_line('deepspeed')}"
    found += [
        "engine one process: yes",
        f"engine DDP, ZeroRedundancyOptimizer: {joined}",
        f"engine FSDP2, HSDP: {joined}",
        f"engine DeepSpeed ZeRO-1, 2, 3: {with_deepspeed}",
    ]
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)]
    found.append(f"environment: {' '.join(settings) or 'nothing set'}")
    print("\n".join(found))
    return 0


def machine(device: str | None = None) -> str:
    """Return the processor or GPU (a GPU where there is one, by default), threads and versions, in one line."""
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{names[0] if names else platform.processor()}, {capability}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def _kernel(device_type: str) -> str:
    """Return the kernel for a type of device, and why; or why there is none."""
    try:
        name = kernels.find(device_type).name
    except NoKernelError as error:
        needs_triton = device_type == "cuda" and _version("triton") is None
        return f"none, the plain rule runs: {error}" + ("; pip install triton" if needs_triton else "")
    if device_type == "cpu":
        return f"{name}, since torch takes this processor for {torch.backends.cpu.get_cpu_capability()}"
    return name if torch.cuda.is_available() else f"{name}, but torch sees no GPU"


def _how_to_install(package: str) -> str:
    line = install_line(package)
    return "is not installed" + (f"; {line}" if line else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        return [f"GPUs: none that torch sees (it was built with {built})"]
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found.append(f"GPU {index}: {card.name}, {memory}, sm_{card.major}{card.minor}, CUDA {torch.version.cuda}")
    return found


def _backends() -> list[str]:
    """Return the ways for processes to talk that this torch has."""
    if not dist.is_available():
        return []
    nccl = [f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"] if dist.is_nccl_available() else []
    return nccl + (["gloo"] if dist.is_gloo_available() else [])


def _compiler() -> str | None:
    """Return the C++ compiler that an installation would take: Triton and DeepSpeed need one too, when they run."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            result = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
            return (result.stdout.splitlines() or [name])[0]
    return None
