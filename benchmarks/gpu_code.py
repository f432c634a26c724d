"""Count what the Triton kernel costs on GPUs, from its compiled code: no GPU is needed.

python benchmarks/gpu_code.py [--sm 80 90 100]

Each variant is compiled for each architecture with Triton's own ptxas. The instructions of the machine code are counted
an element, by the pipe that executes them, on the path that is always taken: the slow path of a division, for quotients
near the ends of float32's range, is left out. From the counts follows a lower bound of the time of a step on a named
GPU: the longest of the time that memory takes at its peak rate and the times that each pipe takes at its peak rate. It
is a bound, not a measurement: it leaves out latencies, and that memory does not reach its peak.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stacey_dist.optim.kernels.triton import BLOCK, WARPS, compile_time_values, stacey_step
from stacey_dist.optim.rule import StaceySettings

BYTES, ADAMW_BYTES = 20, 28
VARIANTS = (("p2", 2.0), ("p2", 3.0), ("p2", 2.8), ("2p", 2.8), ("pp", 2.8))

# By the first part of an instruction's name. What is in no list is counted as control.
PIPES = {
    "float": ("FADD", "FMUL", "FFMA"),
    "packed": ("FADD2", "FMUL2", "FFMA2"),  # two elements in one instruction, which takes the float pipe twice
    "integer": (
        *(
            "IADD",
            "IADD3",
            "VIADD",
            "IMAD",
            "LEA",
            "LOP3",
            "SHF",
            "SEL",
            "ISETP",
            "IMNMX",
            "VIMNMX",
            "PRMT",
            "MOV",
            "IABS",
        ),
        *("FSETP", "FSEL", "FMNMX", "FSET", "FCHK", "PLOP3", "SGXT", "BMSK", "VIADDMNMX", "LOP", "UMOV", "CS2R", "R2P"),
    ),
    "special": ("MUFU", "I2F", "I2FP", "F2I", "F2F", "F2FP", "DADD", "DMUL", "DFMA", "S2R", "S2UR", "POPC", "FLO"),
    "memory": ("LDG", "STG", "LDC", "LDCU", "ULDC", "LDS", "STS", "LDL", "STL"),
}
# Instructions of a pipe a cycle and multiprocessor. All share four schedulers, of one instruction of 32 threads each.
SCHEDULED, SPECIAL = 4 * 32, 16


@dataclass(frozen=True)
class Gpu:
    """A GPU's peak rates, from its maker's data sheet.

    `float_lanes` execute a multiply-add each a cycle; on sm_80, sm_90 and sm_100 as many do what `integer` has, half
    as many.
    """

    name: str
    sm: int
    multiprocessors: int
    gigahertz: float
    terabytes_per_second: float
    float_lanes: int = 64
    integer_lanes: int = 64


GPUS = (
    Gpu("A100 80 GB SXM", 80, 108, 1.41, 2.04),
    Gpu("H100 SXM", 90, 132, 1.755, 3.35, float_lanes=128),
    Gpu("H200", 90, 132, 1.755, 4.8, float_lanes=128),
    Gpu("B200", 100, 148, 1.85, 8.0, float_lanes=128),
)


@dataclass(frozen=True)
class Code:
    """What one variant was compiled to; counts are of instructions an element."""

    pipes: dict[str, float]
    registers: int
    spilled_bytes: int
    warps: int
    """That are resident on a multiprocessor at most."""

    @property
    def instructions(self) -> float:
        """All of them."""
        return sum(self.pipes.values())

    def bound(self, gpu: Gpu) -> float:
        """Return the least time of a step on a GPU, as a multiple of the time that memory takes."""
        cycles = {
            "all": self.instructions / SCHEDULED,
            "float": (self.pipes["float"] + 2 * self.pipes["packed"]) / gpu.float_lanes,
            "integer": self.pipes["integer"] / gpu.integer_lanes,
            "special": self.pipes["special"] / SPECIAL,
        }
        seconds = max(cycles.values()) / (gpu.multiprocessors * gpu.gigahertz * 1e9)
        return max(1.0, seconds / (BYTES / (gpu.terabytes_per_second * 1e12)))


def compile_variant(variant: str, p: float, sm: int) -> Code:
    """Compile the kernel for float32 weights and gradients, bfloat16 states and stochastic rounding."""
    numbers = dict(lr=0.01, alpha=0.01, tau=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    settings = StaceySettings(p=p, variant=variant, **numbers)  # type: ignore[arg-type]
    values = compile_time_values(settings, torch.float32, torch.float32, torch.bfloat16)
    pointers = dict(
        table="*i64", block_rows="*i32", block_numbers="*i64", rates="*fp64", scale="*fp32", found_inf="*fp32"
    )
    signature = {name: pointers.get(name, "constexpr" if name in values else "fp32") for name in stacey_step.arg_names}
    compiled = triton.compile(
        ASTSource(fn=stacey_step, signature=signature, constexprs=values),
        target=GPUTarget("cuda", sm, 32),
        options=dict(num_warps=WARPS, enable_fp_fusion=False),
    )
    return read_code(compiled.asm["cubin"], BLOCK / (32 * WARPS))


def read_code(cubin: bytes, elements_per_thread: float) -> Code:
    """Count the instructions of a kernel, and find what it takes of a multiprocessor."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = _tool("nvdisasm", "-c", str(file))
        usage = _tool("cuobjdump", "--dump-resource-usage", str(file))
    counts = Counter(dict.fromkeys((*PIPES, "control"), 0))
    for name in hot_instructions(listing):
        counts[next((pipe for pipe, names in PIPES.items() if name in names), "control")] += 1
    registers, spilled = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    # 65 536 registers, given out to warps in lots of 256; at most 64 warps.
    warps = min(64, 65_536 // (-(-registers * 32 // 256) * 256) // WARPS * WARPS)
    return Code({pipe: count / elements_per_thread for pipe, count in counts.items()}, registers, spilled, warps)


def hot_instructions(listing: str) -> list[str]:
    """Return the names of a kernel's instructions in nvdisasm's listing, without the slow path of divisions.

    That path is the block behind a branch that is nearly always taken; it calls a function behind the kernel's end.
    """
    names: list[str] = []
    block: list[str] = []
    for line in [*listing.splitlines(), ".L_end:"]:
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d\s+)?([A-Z][A-Z0-9]*)", line)
        if found is not None and found[2] != "NOP":
            block.append(found[2])
        ends = found is not None and found[2] in ("BRA", "EXIT", "RET")
        if ends or re.match(r"\s*\.L_\w+:", line):
            names += [] if "CALL" in block else block
            block = []
        if ends and found is not None and found[2] != "BRA" and not found[1]:
            break  # the kernel's end
    return names


def _tool(name: str, *arguments: str) -> str:
    file = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([file, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, nargs="*", default=[80, 90, 100])
    chosen: Any = parser.parse_args()
    for sm in chosen.sm:
        gpus = [gpu for gpu in GPUS if gpu.sm == sm]
        print(f"\nsm_{sm}: instructions an element; {BYTES} bytes an element (fused AdamW: {ADAMW_BYTES})\n")
        print(f"| | all | {' | '.join((*PIPES, 'control'))} | registers | spilled | warps |", end="")
        print("".join(f" {gpu.name}: × memory time, ns an element |" for gpu in gpus))
        print("|---" * (8 + len(gpus) + len(PIPES) - 2) + "|")
        for variant, p in VARIANTS:
            code = compile_variant(variant, p, sm)
            pipes = " | ".join(f"{count:.1f}" for count in code.pipes.values())
            print(f"| {variant}, p = {p:g} | {code.instructions:.1f} | {pipes} | {code.registers} ", end="")
            print(f"| {code.spilled_bytes} | {code.warps} |", end="")
            for gpu in gpus:
                memory = BYTES / gpu.terabytes_per_second / 1e3
                print(f" {code.bound(gpu):.2f}, {code.bound(gpu) * memory:.4f} |", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
