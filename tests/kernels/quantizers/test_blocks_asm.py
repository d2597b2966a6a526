"""The inline assembly of the quantisers, run on the CPU (tests/ptx.py): every bf16 and fp16 value against the codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import run

from halfbyte.formats import e2m1

blocks = pytest.importorskip("halfbyte.kernels.quantizers.blocks")

EVERY_VALUE = np.arange(65536, dtype=np.uint32)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def words_of(values: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` words of so many pairs of 16-bit values."""
    return [values[2 * word :: 2 * count] | values[2 * word + 1 :: 2 * count] << np.uint32(16) for word in range(count)]


def floats_of(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.uint16).view(np.int16)).view(DTYPES[dtype]).float()


def expected_words(dtype: str, divisor: np.float32) -> np.ndarray:
    codes = e2m1.encode(floats_of(EVERY_VALUE, dtype) / torch.tensor(divisor)).view(-1, 8).numpy().astype(np.uint32)
    return np.bitwise_or.reduce(codes << np.arange(0, 32, 4, dtype=np.uint32), axis=1)


def differing_words(dtype: str, divisor: float, asm: str, *, guarded: bool = False) -> int:
    """How many groups of eight values the assembly and the codec encode differently. `guarded`: blocks without NaN take the branch for it, too."""
    divisor, one = np.float32(divisor), np.float32(1)
    if "$13" not in asm:
        (actual,) = run(asm, ["r"], [*words_of(EVERY_VALUE, 4), np.array([one / divisor])])
        return int((actual.view(np.uint32) != expected_words(dtype, divisor)).sum())
    words = words_of(EVERY_VALUE, 8)
    factor = np.float32(2.0**64 if divisor < 2.0**-60 else 2.0**-64 if divisor > 2.0**60 else 1.0)
    scaled = np.float32(divisor * factor)
    _, has_nan = run(blocks._amax_and_nan_asm(dtype), ["f", "r"], words)
    has_nan = np.ones_like(has_nan) if guarded else has_nan
    low, high = run(asm, ["r", "r"], [*words, *(np.array([x]) for x in (factor, scaled, one / scaled)), has_nan])
    actual = np.stack((low, high), axis=1).reshape(-1).view(np.uint32)
    return int((actual != expected_words(dtype, divisor)).sum())


def divisors_near_ties(count: int) -> list[float]:
    """Divisors a few ulp around those with which some bf16 value is a tie: where the last bit of the quotient decides."""
    generator = np.random.default_rng(0)
    values = (1 + generator.integers(0, 128, count) / 128) * 2.0 ** generator.integers(-20, 20, count)
    exact = np.float32(values / generator.choice(TIES, count))
    return list((exact.view(np.int32) + generator.integers(-2, 3, count).astype(np.int32)).view(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_every_value(dtype):
    generator = np.random.default_rng(1)
    anywhere = 2.0 ** generator.integers(-80, 80, 10) * (1 + generator.random(10))
    asm = blocks._divided_asm(dtype)
    for divisor in (1.0, 3.0, 1 / 3, 2.0**-90, 3e37, *divisors_near_ties(40), *anywhere):
        assert differing_words(dtype, divisor, asm) == 0, divisor


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_branch_for_unusual_blocks_gives_the_same_codes(dtype):
    for divisor in (1.0, 2.0**-90, 3e37, *divisors_near_ties(20)):
        assert differing_words(dtype, divisor, blocks._divided_asm(dtype), guarded=True) == 0, divisor


def test_unusual_blocks_need_their_branch():
    without = blocks._divided_asm("bf16").replace("@!ordinary bra GUARDED;", "")
    for divisor in (1.0, 2.0**-90, 3e37):  # NaN; a quotient that is subnormal or overflows on the way
        assert differing_words("bf16", divisor, without) > 0, divisor


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_by_powers_of_two(dtype):
    for exponent in [*range(-126, 127, 9), 127]:
        assert differing_words(dtype, 2.0**exponent, blocks._codes_asm(dtype)) == 0, exponent


def test_the_reciprocals_second_part_is_needed():
    spoiled = blocks._divided_asm("bf16").replace("fma.rn.f32 x0, x0, y, q;", "mul.rn.f32 x0, x0, y;")
    assert any(differing_words("bf16", divisor, spoiled) for divisor in divisors_near_ties(40))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 11])
def test_ties_of_every_divisor(bits):
    """x * y + x * z, rounded as the assembly does, beside fl(x / d): every mantissa of d, and every x of so many bits with a quotient near a tie."""
    mantissa = np.arange(2**23, 2**24, dtype=np.int64)
    d = (mantissa / 2.0**23).astype(np.float32)
    y = np.float32(1) / d
    (z,) = run(f"{{ mov.f32 y, $2; {blocks._second_part('$1')} mov.f32 $0, z; }}", ["f"], [d, y])
    for m in (4, 5, 6, 7):  # ties are powers of two times 1, 1.25, 1.5 and 1.75
        step = np.where(m * mantissa < 2**26, 2 ** (26 - bits), 2 ** (27 - bits))
        x = (m * mantissa + step // 2) // step * step
        near = np.abs(m * mantissa - x) <= 64  # units of 2^-26 of the quotient or less, where y alone is off by 8
        x = (x[near] / 2.0**25).astype(np.float32)
        (q,) = run(f"{{ mov.f32 y, $2; mov.f32 z, $3; mov.f32 x, $1; {blocks._quotient('x')} mov.f32 $0, x; }}", ["f"], [x, y[near], z[near]])
        assert len(q) > 2000 and np.array_equal(np.sign(q - np.float32(m / 4)), np.sign(x / d[near] - np.float32(m / 4)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_ignores_nan(dtype):
    generator = np.random.default_rng(2)
    blocks_of = generator.integers(0, 65536, (4096, 16)).astype(np.uint32)
    blocks_of[0] = 0x7FFF  # nothing but NaN
    blocks_of[1] = 0x8000
    blocks_of[2:1000] &= 0xBFFF  # none is NaN
    words = [blocks_of[:, 2 * word] | blocks_of[:, 2 * word + 1] << np.uint32(16) for word in range(8)]
    (actual,) = run(blocks._amax_asm(dtype), ["f"], words)
    again, has_nan = run(blocks._amax_and_nan_asm(dtype), ["f", "r"], words)
    assert np.array_equal(again, actual)
    assert np.array_equal(has_nan != 0, floats_of(blocks_of.flatten(), dtype).view(-1, 16).isnan().any(1).numpy()) and not has_nan[2:1000].any()
    expected = floats_of(blocks_of.flatten(), dtype).abs().nan_to_num(nan=0.0, posinf=torch.inf).view(-1, 16).amax(1)
    assert np.array_equal(actual, expected.numpy()) and actual[0] == 0


@pytest.mark.slow
def test_reciprocal_of_every_mantissa():
    """One Newton step from any start within an ulp is correctly rounded, except below 2, where the hardware's start is known to do."""
    d = (np.arange(2**23, dtype=np.uint32) + np.uint32(0x3F800000)).view(np.float32)[:-1]
    (actual,) = run(blocks._RECIPROCAL.value, ["f"], [d])
    assert np.array_equal(actual, np.float32(1.0) / d)
