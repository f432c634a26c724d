"""The counts of benchmarks/gpu_code.py: what the compiled Triton kernel costs an element. No GPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks/gpu_code.py"
COUNT = """
import dataclasses, json
from benchmarks import gpu_code
codes = {}
for variant, p in gpu_code.VARIANTS:
    code = gpu_code.compile_variant(variant, p, 90)
    h100 = next(gpu for gpu in gpu_code.GPUS if gpu.name.startswith("H100"))
    codes[f"{variant} {p:g}"] = dict(**dataclasses.asdict(code), instructions=code.instructions, bound=code.bound(h100))
print(json.dumps(codes))
"""
# A few more than there are; what adds an operation to the rule has to change these.
MOST = {"p2 2": 55, "p2 3": 68, "p2 2.8": 88, "2p 2.8": 147, "pp 2.8": 178}


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiler")
def test_instructions_an_element_do_not_grow():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, env=environment, cwd=FILE.parents[1]
    )
    assert result.returncode == 0, result.stderr[-3000:]
    codes = json.loads(result.stdout)
    assert {name: code["instructions"] for name, code in codes.items() if code["instructions"] > MOST[name]} == {}
    assert all(code["instructions"] > 0.8 * MOST[name] for name, code in codes.items())
    assert all(code["spilled_bytes"] == 0 and code["warps"] >= 16 for code in codes.values())
    assert all(code["bound"] < 1.005 for code in codes.values())  # memory decides, or as good as that


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   FCHK P0, R2, R3 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   MOV R4, 0x50 ;
        /*0040*/                   CALL.REL.NOINC `($div) ;
.L_x_0:
        /*0050*/                   BSYNC B0 ;
        /*0060*/               @P1 EXIT ;
        /*0070*/                   STG.E [R2], R3 ;
        /*0080*/                   EXIT ;
$div:
        /*0090*/                   FFMA R1, R1, R1, R1 ;
        /*00a0*/                   NOP ;
"""


def test_the_slow_road_of_a_division_is_not_counted():
    spec = importlib.util.spec_from_file_location("gpu_code", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_code"] = module
    spec.loader.exec_module(module)
    assert module.hot_instructions(LISTING) == ["LDC", "FCHK", "BRA", "BSYNC", "EXIT", "STG", "EXIT"]
