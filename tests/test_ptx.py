"""The simulator of inline assembly (ptx.py): the PTX ISA's own words on instructions that are easy to get wrong."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import run

ONE = np.float32(1).view(np.uint32)


def compute(asm: str, *inputs: int) -> int:
    return int(run("{ " + asm + " }", ["r"], [np.array([value], np.uint32) for value in inputs])[0].view(np.uint32)[0])


@pytest.mark.parametrize(
    ("asm", "inputs", "expected"),
    [
        ("prmt.b32 $0, $1, $2, 0x7351;", (0x33221100, 0x77665544), 0x77335511),
        ("prmt.b32 $0, $1, $2, $3;", (0x33221100, 0x77665544, 0x0246), 0x00224466),
        ("fma.rn.f32 $0, $1, $2, 0f4B000000;", (np.float32(0.5).view(np.uint32), ONE + 1), 0x4B000001),  # just above a tie
        ("fma.rn.f32 $0, $1, $2, 0f4B000000;", (np.float32(0.5).view(np.uint32), ONE), 0x4B000000),  # a tie
        ("fma.rn.bf16x2 $0, $1, $2, 0x80008000;", (0x8000FFC0, 0x3F803F80), 0x80007FFF),  # -0, and NaN without its sign
        ("min.f32 $0, $1, $2;", (0x7FC00000, ONE), ONE),
        ("max.s32 $0, $1, 0;", (0xFFFFFFFF,), 0),
        ("max.s32 $0, $1, $2;", (0x7FFFFFFF, 0x80000000), 0x7FFFFFFF),
        ("max.s16x2 $0, $1, $2;", (0xFFFF0003, 0x00020004), 0x00020004),
        ("max.u16x2 $0, $1, $2;", (0xFFFF0003, 0x00020004), 0xFFFF0004),
        ("cvt.rn.bf16x2.f32 $0, $1, $2;", (0x3F808000, 0x3F818000), 0x3F803F82),  # two ties: to even
        ("cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", (0x44000000, 0xBF880000), 0x7EB8),  # 512 saturates; -1.0625 is a tie: to even
        ("cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", (0x3A800001, 0xFFC00000), 0x017F),  # just above half the smallest subnormal, and NaN
        ("cvt.rn.f16x2.e4m3x2 $0, $1;", (0xFE01,), 0xDF001800),  # -448 and 2^-9
        ("sub.s32 $0, $1, $2;", (1, 3), 0xFFFFFFFE),
        ("mul.lo.u32 $0, $1, 0x00800080;", (0x0101,), 0x80808080),
        ("shf.r.wrap.b32 $0, $1, $2, 8;", (0x33221100, 0x77665544), 0x44332211),
        ("shf.l.wrap.b32 $0, $1, $2, 8;", (0x33221100, 0x77665544), 0x66554433),
        ("lop3.b32 $0, $1, $2, $3, 0xE2;", (0xFF00FF00, 0xF0F0F0F0, 0x12345678), 0x12345678 & 0x0F0F0F0F | 0xFF00FF00 & 0xF0F0F0F0),
        ("lop3.b32 $0, $1, $2, $3, 0xEA;", (0xFF00FF00, 0xF0F0F0F0, 0x00000001), 0xF000F001),
        ("mul.f16x2 $0, $1, $2;", (0x3C010001, 0x3C013800), 0x3C020000),  # 1 + 2^-9 + 2^-20 and half of the smallest subnormal: to even
        ("mov.b32 {a, b}, $1; mov.b32 $0, {b, a};", (0x12345678,), 0x56781234),
    ],
)
def test_instructions(asm: str, inputs: tuple[int, ...], expected: int) -> None:
    assert compute(asm, *inputs) == expected


def test_a_selector_that_asks_for_a_sign_is_refused() -> None:
    with pytest.raises(AssertionError, match="sign"):
        compute("prmt.b32 $0, $1, $2, 0x8000;", 0, 0)
