"""The inline assembly of the quantisers, run on the CPU (tests/ptx.py): every bf16 and fp16 value against the codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import run

from halfbyte.formats import e2m1

blocks = pytest.importorskip("halfbyte.kernels.triton.blocks")

EVERY_VALUE = np.arange(65536, dtype=np.uint32)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def words_of(values: np.ndarray) -> list[np.ndarray]:
    """Four words of eight 16-bit values."""
    return [values[2 * word :: 8] | values[2 * word + 1 :: 8] << np.uint32(16) for word in range(4)]


def floats_of(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.uint16).view(np.int16)).view(DTYPES[dtype]).float()


def parameter(value: np.float32, dtype: str) -> np.ndarray:
    """As `codes4` passes it: a pair of bf16, or fp32."""
    bits = value.view(np.uint32)
    return np.array([(bits >> np.uint32(16)) * np.uint32(0x10001) if dtype == "bf16" else bits])


def differing_words(dtype: str, divisor: float, asm: str) -> int:
    """How many groups of eight the assembly and the codec encode differently, of all values of the dtype."""
    divide = "$8" in asm
    divisor = np.float32(divisor)
    factor = np.float32(2.0**64 if divisor < 2.0**-60 else 2.0**-64 if divisor > 2.0**60 else 1.0) if divide else np.float32(1.0) / divisor
    scaled = np.float32(divisor * factor)
    inputs = [*words_of(EVERY_VALUE), parameter(factor, dtype), parameter(np.float32(6.5) * (scaled if divide else np.float32(1)), dtype)]
    if divide:
        inputs += [np.array([scaled]), np.array([np.float32(1.0) / scaled])]
    (actual,) = run(asm, ["r"], inputs)
    codes = e2m1.encode(floats_of(EVERY_VALUE, dtype) / torch.tensor(divisor)).view(-1, 8).numpy().astype(np.uint32)
    expected = np.bitwise_or.reduce(codes << np.arange(0, 32, 4, dtype=np.uint32), axis=1)
    return int((actual.view(np.uint32) != expected).sum())


def divisors_near_ties(count: int) -> list[float]:
    """Divisors a few ulp around those with which some bf16 value is a tie: where the last bit of the quotient decides."""
    generator = np.random.default_rng(0)
    values = (1 + generator.integers(0, 128, count) / 128) * 2.0 ** generator.integers(-20, 20, count)
    exact = np.float32(values / generator.choice(TIES, count))
    return list((exact.view(np.int32) + generator.integers(-2, 3, count).astype(np.int32)).view(np.float32))


def asm_of(dtype: str, divide: bool) -> str:
    return blocks._codes_asm(dtype, divide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_every_value(dtype):
    generator = np.random.default_rng(1)
    anywhere = 2.0 ** generator.integers(-80, 80, 40) * (1 + generator.random(40))
    for divisor in (1.0, 3.0, 1 / 3, 2.0**-90, 3e37, *divisors_near_ties(100), *anywhere):
        assert differing_words(dtype, divisor, asm_of(dtype, True)) == 0, divisor


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_by_powers_of_two(dtype):
    for exponent in [*range(-126, 127, 9), 127]:
        assert differing_words(dtype, 2.0**exponent, asm_of(dtype, False)) == 0, exponent


def test_the_last_correction_is_needed():
    spoiled = asm_of("bf16", True).replace("fma.rn.f32 q, r, $8, q;", "")
    assert sum(differing_words("bf16", divisor, spoiled) for divisor in divisors_near_ties(100)) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_ignores_nan(dtype):
    generator = np.random.default_rng(2)
    blocks_of = generator.integers(0, 65536, (4096, 16)).astype(np.uint32)
    blocks_of[0] = 0x7FFF  # nothing but NaN
    blocks_of[1] = 0x8000
    words = [blocks_of[:, 2 * word] | blocks_of[:, 2 * word + 1] << np.uint32(16) for word in range(8)]
    (actual,) = run(blocks._amax_asm(dtype), ["f"], words)
    expected = floats_of(blocks_of.flatten(), dtype).abs().nan_to_num(nan=0.0, posinf=torch.inf).view(-1, 16).amax(1)
    assert np.array_equal(actual, expected.numpy()) and actual[0] == 0


def test_reciprocal_of_every_mantissa():
    """One Newton step from any start within an ulp is correctly rounded, except below 2, where the hardware's start is known to do."""
    d = (np.arange(2**23, dtype=np.uint32) + np.uint32(0x3F800000)).view(np.float32)[:-1]
    (actual,) = run(blocks._RECIPROCAL.value, ["f"], [d])
    assert np.array_equal(actual, np.float32(1.0) / d)
