"""The few integer and fp16 instructions of the dequantisers' inline PTX, executed on torch tensors: the kernel's own text is tested without a GPU."""

from __future__ import annotations

import re

import torch

MASK = 0xFFFFFFFF


def execute(assembly: str, inputs: dict[int, torch.Tensor], num_outputs: int) -> list[torch.Tensor]:
    """Run `assembly` on int64 tensors that hold 32-bit values, one a thread: `inputs` by operand number; the values of $0 .. $num_outputs - 1."""
    registers: dict[str, torch.Tensor] = {f"${number}": value & MASK for number, value in inputs.items()}
    shape = next(iter(inputs.values()))

    def read(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.full_like(shape, int(name, 0) & MASK)

    for statement in re.split(r";\s*", assembly.strip("{}\n ")):
        if not statement or statement.startswith(".reg"):
            continue
        opcode, operands = statement.split(None, 1)
        if "{" in operands:
            destination, first, second = re.findall(r"[\w$]+", operands)
            registers[destination] = read(first) | read(second) << 16
            continue
        destination, *sources = (part.strip() for part in operands.split(","))
        registers[destination] = INSTRUCTIONS[opcode](*map(read, sources)) & MASK
    return [registers[f"${number}"] for number in range(num_outputs)]


def _signed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 1 << 31, x - (1 << 32), x)


def _prmt(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    both, result = a | b << 32, torch.zeros_like(a)
    for byte in range(4):
        nibble = selector >> 4 * byte & 0xF
        assert not (nibble & 8).any(), "a selector asks for the sign"
        result |= (both >> 8 * nibble & 0xFF) << 8 * byte
    return result


def _lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(a)
    for case in range(8):
        if table.flatten()[0].item() >> case & 1:
            result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return result


def _half_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x & 0xFFFF, x >> 16), -1).to(torch.uint16).view(torch.float16)


def _mul_f16x2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    bits = (_half_pairs(a).float() * _half_pairs(b).float()).half().view(torch.uint16).long()
    return bits[..., 0] | bits[..., 1] << 16


def _to_e4m3x2(a: torch.Tensor) -> torch.Tensor:
    bits = _half_pairs(a).float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).long()
    return bits[..., 0] | bits[..., 1] << 8


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shf.r.wrap.b32": lambda low, high, by: (low | high << 32) >> by,
    "sub.s32": lambda a, b: a - b,
    "max.s32": lambda a, b: torch.maximum(_signed(a), _signed(b)),
    "mul.lo.u32": lambda a, b: a * b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "mul.f16x2": _mul_f16x2,
    "cvt.rn.satfinite.e4m3x2.f16x2": _to_e4m3x2,
}
