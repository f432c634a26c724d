"""The code that Triton compiles for GPUs, executed on the CPU: PTX as C, run thread by thread.

Each instruction that our kernels use is a line of C in a table below, with its rounding; anything else raises
`UnknownCodeError`. As on a GPU, each NaN that arithmetic makes is 0x7fffffff, and a vector has to lie at a multiple of
its size. An access outside of the memory that a launch names raises `AccessError`.

What stands here is PTX's definition ("Parallel Thread Execution ISA"); the machine code that ptxas makes of it, and the
GPU, are not tested.
"""

import ctypes
import re
import struct
import subprocess
import tempfile

import torch


class UnknownCodeError(Exception):
    """A line of PTX whose meaning does not stand here."""


class AccessError(Exception):
    """A thread has touched memory that it must not, or a vector at an address that is no multiple of its size."""


def _pair(operation):
    """An operation on the lower and on the upper halves of 64 bits."""
    upper = re.sub(r"F\((.)\)", r"F(\1 >> 32)", operation)
    return f"{operation} | (uint64_t)({upper}) << 32"


# Of operands a, b and c, whose type is the instruction's last: f32, s32, u32 and b32 are uint32_t, f64, s64, u64 and
# b64 uint64_t. c is uint64_t in any case. F and D read bits as a number, N and E write them.
_ADD, _SUBTRACT, _MULTIPLY = "N(F(a) + F(b))", "N(F(a) - F(b))", "N(F(a) * F(b))"
_FUSED = "N(fmaf(F(a), F(b), F(c)))"
EXPRESSIONS = {
    "abs.f32": "a & 0x7fffffff",
    "neg.f32": "a ^ 0x80000000",
    "add.rn.f32": _ADD,
    "sub.rn.f32": _SUBTRACT,
    "mul.rn.f32": _MULTIPLY,
    "div.rn.f32": "N(F(a) / F(b))",
    "sqrt.rn.f32": "N(sqrtf(F(a)))",
    "fma.rn.f32": _FUSED,
    "add.rn.f32x2": _pair(_ADD),
    "sub.rn.f32x2": _pair(_SUBTRACT),
    "mul.rn.f32x2": _pair(_MULTIPLY),
    "fma.rn.f32x2": _pair(_FUSED),
    # The number if the other is NaN; of two zeros the positive one.
    "max.f32": "F(a) == F(b) ? a & b : F(a) > F(b) || F(b) != F(b) ? N(F(a)) : b",
    "add.rn.f64": "E(D(a) + D(b))",
    "mul.rn.f64": "E(D(a) * D(b))",
    "cvt.rn.f32.f64": "N((float)D(a))",
    "cvt.u32.u16": "a",
    "cvt.u32.u64": "a",
    "cvt.u64.u32": "a",
    "cvt.s64.s32": "(int64_t)(int32_t)a",
    "not.b32": "~a",
    "neg.s32": "-a",
    "max.s32": "(int32_t)a > (int32_t)b ? a : b",
    "mul.wide.u32": "(uint64_t)a * b",
    "mad.wide.s32": "(int64_t)(int32_t)a * (int32_t)b + c",
    "mad.wide.u32": "(uint64_t)a * b + c",
    "mad.lo.s64": "a * b + c",
    "shl.b32": "b > 31 ? 0 : a << b",
    "shl.b64": "b > 63 ? 0 : a << b",
    "shr.u32": "b > 31 ? 0 : a >> b",
    "shr.u64": "b > 63 ? 0 : a >> b",
    "shr.s32": "(int32_t)a >> (b > 31 ? 31 : b)",
    "shr.s64": "(int64_t)a >> (b > 63 ? 63 : b)",
    "shf.l.wrap.b32": "((uint64_t)b << 32 | a) << (c & 31) >> 32",
    "bfe.u32": "(uint64_t)a >> (b & 255) & ((1ull << (c & 255)) - 1)",  # of up to 31 bits
    "prmt.b32": "prmt(a, b, c)",
    "setp.num.f32": "F(a) == F(a) && F(b) == F(b)",
    "setp.neu.f32": "F(a) != F(b)",
}
EXPRESSIONS |= {f"selp.{kind}": "c ? a : b" for kind in ("b16", "b32", "b64", "f32")}
EXPRESSIONS |= {f"mov.{kind}": "a" for kind in ("pred", "b16", "b32", "b64", "u16", "u32", "u64")}
EXPRESSIONS |= {
    f"{name}.{kind}": f"a {operation} b"
    for name, operation in {"and": "&", "or": "|", "xor": "^"}.items()
    for kind in ("pred", "b32", "b64")
}
EXPRESSIONS |= {
    f"{name}.{kind}": f"a {operation} b"
    for name, operation in {"add": "+", "sub": "-", "mul.lo": "*"}.items()
    for kind in ("s32", "s64")
}
_READ = {"f32": "F({})", "s32": "(int32_t){}", "s64": "(int64_t){}"}
EXPRESSIONS |= {
    f"setp.{name}.{kind}": f"{_READ.get(kind, '{}').format('a')} {operation} {_READ.get(kind, '{}').format('b')}"
    for name, operation in {"eq": "==", "lt": "<", "ge": ">="}.items()
    for kind in ("b32", "b64", "s32", "s64", "f32")
}
TYPES = {"pred": "uint8_t", "b16": "uint16_t", "u16": "uint16_t"}
TYPES |= dict.fromkeys(("f32", "s32", "u32", "b32"), "uint32_t")
TYPES |= dict.fromkeys(("f64", "s64", "u64", "b64", "f32x2"), "uint64_t")
REGISTERS = {"p": "uint8_t", "rs": "uint16_t", "r": "uint32_t", "rd": "uint64_t"}
SPECIAL = {"%tid.x": "thread", "%ctaid.x": "block"}
IGNORED = (".loc", ".reg", ".pragma", ".reqntid", ".maxntid", ".minnctapersm")

PROGRAM = r"""
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
enum { NOT_A_NUMBER = 0x7fffffff };
typedef struct { uint64_t block, thread; } Place;
static const uint64_t *parameters, *memory;
static uint64_t ranges, fault_address;
static volatile int fault;
static pthread_barrier_t barrier;
static _Alignas(16) char shared[1 << 16];

static float F(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static double D(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static uint32_t N(float x) { uint32_t bits; memcpy(&bits, &x, 4); return x == x ? bits : NOT_A_NUMBER; }
static uint64_t E(double x) { uint64_t bits; memcpy(&bits, &x, 8); return x == x ? bits : 0x7fffffffffffffff; }
static uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = (uint64_t)b << 32 | a; uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    if (selector >> 4 * i & 8) fault = 1;  // the sign, repeated
    result |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  }
  return result;
}
static char *global_at(uint64_t address, int bytes) {
  static _Thread_local _Alignas(16) char nowhere[16];
  for (uint64_t i = 0; i < ranges && address % bytes == 0; i++)
    if (memory[2 * i] <= address && address + bytes <= memory[2 * i + 1]) return (char *)address;
  fault = 2; fault_address = address;
  return nowhere;
}
static char *shared_at(uint64_t address, int bytes) {
  if (address % bytes == 0 && address + bytes <= sizeof shared) return shared + address;
  fault = 3; fault_address = address;
  return shared;
}
static void *run_thread(void *place) {
  uint32_t block = ((Place *)place)->block, thread = ((Place *)place)->thread;
  REGISTERS
  CODE
}
int run(uint64_t blocks, const uint64_t *given, const uint64_t *allowed, uint64_t count, uint64_t *address) {
  parameters = given; memory = allowed; ranges = count; fault = 0;
  pthread_t threads[THREADS]; Place places[THREADS];
  for (uint64_t block = 0; block < blocks; block++) {
    memset(shared, 0xff, sizeof shared);
    pthread_barrier_init(&barrier, 0, THREADS);
    for (uint64_t i = 0; i < THREADS; i++) {
      places[i] = (Place){block, i};
      pthread_create(&threads[i], 0, run_thread, &places[i]);
    }
    for (uint64_t i = 0; i < THREADS; i++) pthread_join(threads[i], 0);
    pthread_barrier_destroy(&barrier);
  }
  *address = fault_address;
  return fault;
}
"""


class Executable:
    """One kernel's PTX, compiled for this processor."""

    def __init__(self, ptx):
        head, body = re.search(r"\.visible \.entry \w+\((.*?)\)\n(.*?)^}", ptx, re.S | re.M).groups()
        self._parameters = re.findall(r"\.param \.(\w+).*?(\w+_param_\d+)", head)
        self._shared = re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\]", ptx)
        sizes = re.findall(r"\.reg \.\w+\s+%(\w+)<(\d+)>", body)
        registers = "\n".join(f"{REGISTERS[name]} {name}[{size}];" for name, size in sizes)
        (threads,) = re.findall(r"\.reqntid (\d+)", body)
        code = "\n".join(self._statement(line) for line in body[body.index("{") + 1 :].splitlines())
        source = PROGRAM.replace("THREADS", threads).replace("REGISTERS", registers).replace("CODE", code)
        with tempfile.TemporaryDirectory() as directory:
            library = f"{directory}/kernel.so"
            options = ["-shared", "-fPIC", "-ffp-contract=off", "-pthread", "-w", "-x", "c", "-", "-lm"]
            subprocess.run(["gcc", *options, "-o", library], input=source.encode(), check=True)
            self._run = ctypes.CDLL(library).run

    def __call__(self, blocks, arguments, memory):
        """Run so many blocks. Arguments are tensors or numbers; `memory` holds the tensors that they lead to."""
        tensors = [*memory, *(value for value in arguments if isinstance(value, torch.Tensor))]
        spans = [edge for t in tensors for edge in (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())]
        given = [self._bits(kind, value) for (kind, _), value in zip(self._parameters, [*arguments, 0, 0], strict=True)]
        address = ctypes.c_uint64()
        fault = self._run(
            ctypes.c_uint64(blocks), (ctypes.c_uint64 * len(given))(*given), (ctypes.c_uint64 * len(spans))(*spans),
            ctypes.c_uint64(len(tensors)), ctypes.byref(address),
        )  # fmt: skip
        if fault == 1:
            raise UnknownCodeError("an instruction met operands whose meaning does not stand here")
        if fault:
            raise AccessError(f"{'global' if fault == 2 else 'shared'} memory at {address.value:#x}")

    @staticmethod
    def _bits(kind, value):
        if isinstance(value, torch.Tensor):
            return value.data_ptr()
        return struct.unpack("I", struct.pack("f", value))[0] if kind == "f32" else value

    def _statement(self, line):
        """One line of PTX in C."""
        text = line.partition("//")[0].strip()
        if not text or text.startswith(IGNORED):
            return ""
        if label := re.fullmatch(r"\$(\w+):", text):
            return f"{label[1]}:;"
        found = re.fullmatch(r"(?:@(!?)%(p\d+) )?([\w.]+)\s*(.*);", text)
        if not found:
            raise UnknownCodeError(text)
        negated, predicate, name, rest = found.groups()
        operands = re.findall(r"\{.*?\}|\[.*?\]|[^,\s]+", rest)
        try:
            does = self._instruction(name, operands)
        except (KeyError, ValueError, TypeError) as error:
            raise UnknownCodeError(text) from error
        return f"if ({negated}{self._value('%' + predicate)}) {{ {does} }}" if predicate else f"{{ {does} }}"

    def _instruction(self, name, operands):
        if name == "ret":
            return "return 0;"
        if name == "bra":
            return f"goto {operands[0].removeprefix('$')};"
        if (name, *operands) == ("bar.sync", "0"):
            return "pthread_barrier_wait(&barrier);"
        if name.startswith(("ld.", "st.")):
            return self._access(*name.split(".", 2), *operands)
        if name.startswith("mov.") and "{" in "".join(operands):
            return self._pack(*operands)
        kind = TYPES[name.rpartition(".")[2]]
        values = [self._value(operand) for operand in operands[1:]]
        declared = zip((kind, kind, "uint64_t"), "abc", values, strict=False)
        assigned = "".join(f"{c_type} {letter} = {value}; " for c_type, letter, value in declared)
        return f"{assigned}{self._value(operands[0])} = {EXPRESSIONS[name]};"

    def _access(self, direction, space, kind, *operands):
        """Loads and stores: of parameters, and of one number or a vector in memory."""
        numbers, place = operands if direction == "ld" else operands[::-1]
        registers = [self._value(word) for word in re.findall(r"%\w+", numbers)]
        found = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(\d+)\s*)?\]", place)
        if space == "param":
            index = [parameter for _, parameter in self._parameters].index(found[1])
            return f"{registers[0]} = parameters[{index}];"
        count, element = re.fullmatch(r"(?:v(\d)\.)?[bu](\d+)", kind).groups()
        size, count = int(element) // 8, int(count or 1)
        if space not in ("global", "shared") or len(registers) != count:
            raise ValueError(kind)
        address = f"char *at = {space}_at({self._value(found[1])} + {found[2] or 0}ull, {size * count});"
        for i, register in enumerate(registers):
            ends = (f"&{register}", f"at + {i * size}")
            to, source = ends if direction == "ld" else ends[::-1]
            address += f" memcpy({to}, {source}, {size});"
        return address

    def _pack(self, target, source):
        """Two registers as one of twice the size, or back."""
        parts = re.findall(r"_|%\w+", target if "{" in target else source)
        lower, upper = (None if part == "_" else self._value(part) for part in parts)
        if "{" in source:
            width = {"rs": 16, "r": 32}[re.match(r"%([a-z]+)", parts[0])[1]]
            return f"{self._value(target)} = {lower} | (uint64_t){upper} << {width};"
        width = {"r": 16, "rd": 32}[re.match(r"%([a-z]+)", source)[1]]
        halves = ((lower, 0), (upper, width))
        return " ".join(f"{half} = {self._value(source)} >> {shift};" for half, shift in halves if half)

    def _value(self, text):
        if register := re.fullmatch(r"%(p|rs|r|rd)(\d+)", text):
            return f"{register[1]}[{register[2]}]"
        if text in self._shared:
            return "0"
        if float_bits := re.fullmatch(r"0[fd]([0-9A-F]+)", text):
            return f"0x{float_bits[1]}ull"
        if re.fullmatch(r"-?\d+|0x[0-9A-F]+U?", text):
            return f"{text.removesuffix('U')}ull"
        return SPECIAL[text]
