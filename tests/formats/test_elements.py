"""e2m1, e4m3 and e8m0, exhaustively, against definitions written out here in exact arithmetic (fractions)."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import InputError
from halfbyte.formats import e2m1, e4m3, e8m0

MAGNITUDES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
BOUNDARIES = [(low + high) / 2 for low, high in itertools.pairwise(MAGNITUDES)]


def nearest_e2m1(value: float) -> int:
    """The definition: nearest magnitude, ties to the even code, saturation, NaN to +6, sign of zero kept."""
    if math.isnan(value):
        return 7
    sign = 8 if math.copysign(1.0, value) < 0 else 0
    if math.isinf(value):
        return 7 + sign
    magnitude = abs(Fraction(value))
    return sign + min(range(8), key=lambda code: (abs(MAGNITUDES[code] - magnitude), code % 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_e2m1_boundaries_and_their_neighbours(dtype: torch.dtype) -> None:
    points = torch.tensor([float(b) for b in BOUNDARIES] + [float(m) for m in MAGNITUDES] + [7.0, 1e4, 1e-4], dtype=dtype)
    infinity = torch.full_like(points, torch.inf)
    x = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    x = torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0], dtype=dtype)])
    assert e2m1.encode(x).tolist() == [nearest_e2m1(v) for v in x.tolist()]


def test_e2m1_every_bf16_and_fp16_value() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).float()
        magnitude = x.abs()
        expected = sum((magnitude > float(b)) if i % 2 == 0 else (magnitude >= float(b)) for i, b in enumerate(BOUNDARIES))
        expected = torch.where(x.isnan(), 7, expected + 8 * (torch.signbit(x) & ~x.isnan()))
        assert torch.equal(e2m1.encode(bits.view(dtype)), expected.to(torch.uint8))


def test_e2m1_round_trip_of_codes_and_packing() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(e2m1.encode(e2m1.decode(codes)), codes)
    every_byte = torch.arange(256, dtype=torch.uint8)
    unpacked = e2m1.unpack(every_byte)
    assert unpacked[0::2].tolist() == [b & 15 for b in range(256)], "low nibble is the even column"
    assert torch.equal(e2m1.pack(unpacked), every_byte)
    assert torch.equal(e2m1.decode_packed(every_byte), e2m1.decode(unpacked))
    assert e2m1.decode(codes).tolist() == [s * float(m) for s in (1, -1) for m in MAGNITUDES]
    with pytest.raises(InputError, match="odd number"):
        e2m1.pack(codes[:3])


def e4m3_value(byte: int) -> Fraction | None:
    sign, exponent, mantissa = -1 if byte >> 7 else 1, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return None
    return sign * (Fraction(mantissa, 8) * Fraction(1, 64) if exponent == 0 else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7))


def test_e4m3_all_bytes_and_midpoints() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    decoded = e4m3.as_e4m3(every_byte).float()
    for byte, value in enumerate(decoded.tolist()):
        expected = e4m3_value(byte)
        assert math.isnan(value) if expected is None else Fraction(value) == expected
    finite = [b for b in range(256) if e4m3_value(b) is not None]
    again = e4m3.encode(decoded[finite]).view(torch.uint8).tolist()
    assert again == finite
    for byte in range(0x7E):  # midpoints of neighbours tie to the even byte; a hair to either side goes to the nearer one
        low, high = decoded[byte].item(), decoded[byte + 1].item()
        middle = torch.tensor((low + high) / 2)
        around = torch.stack([torch.nextafter(middle, torch.tensor(0.0)), middle, torch.nextafter(middle, torch.tensor(1e9))])
        assert e4m3.encode(around).view(torch.uint8).tolist() == [byte, byte + byte % 2, byte + 1]


def test_e4m3_saturates_and_keeps_nan() -> None:
    x = torch.tensor([448.0, 449.0, 464.0, 465.0, 1e30, torch.inf, -torch.inf, torch.nan, 2.0**-10, 2.0**-9])
    assert e4m3.encode(x).view(torch.uint8).tolist() == [0x7E] * 6 + [0xFE, 0x7F, 0, 1]


def test_e8m0_all_bytes() -> None:
    decoded = e8m0.decode(torch.arange(256, dtype=torch.uint8))
    assert all(Fraction(v) == Fraction(2) ** (b - 127) for b, v in enumerate(decoded[:255].tolist()))
    assert decoded[255].isnan()
    assert torch.equal(e8m0.decode(torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)), decoded[:255])


def e8m0_by_definition(amax: float, element_max: int, rule: str) -> int:
    """The three rules in exact arithmetic; amax > 0 and finite."""
    value = Fraction(amax)
    if rule == "ceil":
        exponent = next(e for e in range(math.frexp(amax)[1] - 8, 200) if Fraction(2) ** e >= value / element_max)
    else:
        floor = math.frexp(amax)[1] - 1
        if rule == "even" and value / Fraction(2) ** floor >= Fraction(7, 4):  # 1.11b rounds up at two mantissa bits, half up
            floor += 1
        exponent = floor - (element_max.bit_length() - 1)
    return min(max(exponent + 127, 0), 254)


@pytest.mark.parametrize("rule", e8m0.RULES)
@given(amax=st.floats(min_value=2.0**-126, max_value=2.0**127, width=32))
def test_e8m0_rules(rule: str, amax: float) -> None:
    assert e8m0.encode(torch.tensor([amax]), 6.0, rule).item() == e8m0_by_definition(amax, 6, rule)


@pytest.mark.parametrize("rule", e8m0.RULES)
def test_e8m0_rule_at_every_power_of_two_and_its_neighbours(rule: str) -> None:
    exact = torch.cat([m * torch.exp2(torch.arange(-124.0, 125.0)) for m in (1.0, 1.25, 1.5, 1.75)])
    amax = torch.cat([exact, torch.nextafter(exact, torch.tensor(0.0)), torch.nextafter(exact, torch.tensor(torch.inf))])
    expected = [e8m0_by_definition(value, 6, rule) for value in amax.tolist()]
    assert e8m0.encode(amax, 6.0, rule).tolist() == expected


def test_e8m0_special_values_and_bad_rule() -> None:
    for rule in e8m0.RULES:
        assert e8m0.encode(torch.tensor([0.0, torch.inf, torch.nan, 2.0**-140]), 6.0, rule).tolist() == [0, 254, 255, 0]
    assert e8m0.encode(torch.tensor([448.0, 449.0]), 448.0, "ceil").tolist() == [127, 128]
    with pytest.raises(InputError, match="'ceil' or 'floor' or 'even'"):
        e8m0.encode(torch.ones(1), 6.0, "round")  # type: ignore[arg-type]
