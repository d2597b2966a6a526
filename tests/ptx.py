"""Run the inline assembly of kernels on a CPU: the few PTX instructions they use, elementwise on numpy arrays, rounded as the hardware rounds.

run(asm, outputs=["f"], inputs=[words, factor])     int32 and uint32 arrays are "r" registers, float32 arrays "f"
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

CANONICAL_NAN = {"f32": 0x7FFFFFFF, "bf16": 0x7FFF, "f16": 0x7FFF}


def run(asm: str, outputs: Sequence[str], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The output registers ("r": int32, "f": float32) after running `asm` with these inputs, which broadcast.

    Branches lead forward: a lane that takes one does nothing until the label.
    """
    arrays = np.broadcast_arrays(*inputs)
    registers = {f"${index + len(outputs)}": np.ascontiguousarray(array).view(np.uint32) for index, array in enumerate(arrays)}
    waits_for, runs = np.full(arrays[0].shape, "", object), None  # the label, and which lanes do not wait, None if all
    with np.errstate(all="ignore"):
        for statement in re.sub(r"^\{|\}$", "", asm.strip()).split(";"):
            label, _, statement = (part.strip() for part in statement.rpartition(":"))
            if label:
                waits_for[waits_for == label] = ""
                runs = None if (waits_for == "").all() else waits_for == ""
            if not statement or statement.startswith(".reg"):
                continue
            predicate, operation, operands = re.fullmatch(r"(?:@(!?\w+) )?(\S+) (.*)", statement).groups()
            if operation == "bra":
                waits_for[(waits_for == "") & _holds(registers, predicate)] = operands
                runs = waits_for == ""
            else:
                assert predicate is None, statement
                _step(operation, operands, registers, runs)
    assert (waits_for == "").all(), "a branch leads backward"
    found = [np.broadcast_to(registers[f"${index}"], arrays[0].shape).copy() for index in range(len(outputs))]
    return [array.view(np.int32 if kind == "r" else np.float32) for array, kind in zip(found, outputs, strict=True)]


def _holds(registers: dict[str, np.ndarray], predicate: str | None) -> np.ndarray:
    if predicate is None:
        return np.True_
    return ~registers[predicate[1:]] if predicate.startswith("!") else registers[predicate]


def _step(operation: str, operands: str, registers: dict[str, np.ndarray], runs: np.ndarray | None) -> None:
    """One instruction, of the lanes that are running."""

    def write(target: str, value: np.ndarray) -> None:
        registers[target] = value if runs is None else np.where(runs, value, registers.get(target, np.zeros_like(value)))

    if operation == "mov.b32" and "{" in operands:  # a pair of 16-bit registers from a word, or the other way round
        first, second, third = re.findall(r"[\w$]+", operands)
        if operands.startswith("{"):
            write(first, registers[third] & 0xFFFF)
            write(second, registers[third] >> 16)
        else:
            write(first, registers[second] | registers[third] << np.uint32(16))
        return
    target, *sources = (part.strip() for part in operands.split(","))
    values = [registers[name] if name in registers else np.uint32(_literal(name)) for name in sources]
    write(target, _compare(operation, values) if operation.startswith("setp") else _compute(operation, values))


def _compare(operation: str, v: list[np.ndarray]) -> np.ndarray:
    """setp: a predicate, which may be and-ed with a third operand."""
    _, test, *is_and, kind = operation.split(".")
    a, b = (_to_double(x, "f32") if kind == "f32" else x for x in v[:2])
    holds = {"eq": a == b, "num": ~np.isnan(a) & ~np.isnan(b)}[test]
    return holds & v[2] if is_and else holds


def _literal(text: str) -> int:
    return (int(text[2:], 16) if text.startswith("0f") else int(text, 0)) & 0xFFFFFFFF


def _compute(operation: str, v: list[np.ndarray]) -> np.ndarray:
    name, *rest = operation.split(".")
    kind = rest[-1]
    if kind in ("bf16x2", "f16x2"):
        low = _float(operation, kind[:-2], [x & np.uint32(0xFFFF) for x in v])
        return low | _float(operation, kind[:-2], [x >> np.uint32(16) for x in v]) << np.uint32(16)
    if operation in ("max.s16x2", "max.u16x2"):
        halves = np.int16 if operation == "max.s16x2" else np.uint16
        return np.maximum(*(x.copy().view(halves) for x in np.broadcast_arrays(*map(np.atleast_1d, v)))).view(np.uint32)
    if operation == "cvt.f32.f16":
        return _bits(_to_double(v[0], "f16"), "f32")
    if operation == "rcp.approx.ftz.f32":
        return _bits(1.0 / _to_double(v[0], "f32"), "f32")
    if operation == "cvt.rz.bf16x2.f32":  # the first operand is the upper half
        return (v[0] & np.uint32(0xFFFF0000)) | v[1] >> np.uint32(16)
    if operation == "cvt.rn.bf16x2.f32":
        high, low = (_bits(_to_double(x, "f32"), "bf16") for x in v)
        return high << np.uint32(16) | low
    if operation == "cvt.rn.satfinite.e4m3x2.f32":
        return _e4m3(v[0]) << np.uint32(8) | _e4m3(v[1])
    if operation == "cvt.rn.f16x2.e4m3x2":
        return _f16_of_e4m3(v[0] >> np.uint32(8)) << np.uint32(16) | _f16_of_e4m3(v[0])
    if kind == "f32" and name != "mov":
        return _float(operation, "f32", v)
    integer = {
        "mov": lambda a: a,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "max": lambda a, b: np.maximum(a.view(np.int32), b.view(np.int32)).view(np.uint32),
        "min": lambda a, b: np.minimum(a.view(np.int32), b.view(np.int32)).view(np.uint32),
        "shl": lambda a, b: a << b,
        "shr": lambda a, b: a >> b,
        "shf": lambda low, high, by: _funnel(low, high, by if rest[0] == "r" else np.uint32(32) - by),
        "mul": lambda a, b: a * b,
        "mad": lambda a, b, c: a * b + c,
        "lop3": _lop3,
        "prmt": _prmt,
    }
    return integer[name](*v).astype(np.uint32)


def _funnel(low: np.ndarray, high: np.ndarray, by: np.uint32) -> np.ndarray:
    return (high.astype(np.uint64) << np.uint64(32) | low) >> np.uint64(by) & np.uint64(0xFFFFFFFF)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.uint32) -> np.ndarray:
    result = np.zeros_like(a)
    for case in range(8):
        if int(table) >> case & 1:
            result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both, result = b.astype(np.uint64) << np.uint64(32) | a, np.uint64(0)
    for byte in range(4):
        nibble = np.asarray(selector, np.uint64) >> np.uint64(4 * byte) & np.uint64(0xF)
        assert not (nibble & np.uint64(8)).any(), "a selector asks for the sign"
        result = result | (both >> np.uint64(8) * nibble & np.uint64(0xFF)) << np.uint64(8 * byte)
    return result


def _float(operation: str, kind: str, v: list[np.ndarray]) -> np.ndarray:
    name = operation.split(".")[0]
    sign = np.uint32(0x80000000 if kind == "f32" else 0x8000)
    if name == "abs":
        return v[0] & ~sign & np.uint32(0xFFFFFFFF)
    if name == "neg":
        return v[0] ^ sign
    d = [_to_double(x, kind) for x in v]
    if name in ("min", "max"):
        if ".NaN" in operation:
            return _bits((np.minimum if name == "min" else np.maximum)(*d), kind)
        return _bits((np.fmin if name == "min" else np.fmax)(*d), kind)  # the number beside a NaN
    if name == "mul":
        product = d[0] * d[1]  # at most 48 bits: exact
        bits = _bits(product, kind)
        if ".rp" in operation:
            above = np.nextafter(np.asarray(bits).view(np.float32), np.float32(np.inf)).view(np.uint32)
            return np.where(_to_double(bits, kind) < product, above, bits)
        return bits
    product, addend = (d[0] * d[1], d[2]) if name == "fma" else (d[0], d[1])
    return _bits(_add_to_odd(product, addend), kind)


def _add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64 with the last bit set where inexact: rounding that to fewer bits is rounding once."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    inexact = np.isfinite(total) & (error != 0)
    even = total.view(np.int64) & 1 == 0
    return np.where(inexact & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def _e4m3(bits: np.ndarray) -> np.ndarray:
    """The code of an fp32, to nearest even and at most 448; NaN is positive."""
    x = _to_double(bits, "f32")
    magnitude = np.minimum(np.abs(np.where(np.isnan(x), 0, x)), 448)
    exponent = np.where(magnitude < 2.0**-6, -6, np.frexp(magnitude)[1] - 1)
    code = (exponent + 6) * 8 + np.rint(magnitude * 2.0 ** (3 - exponent)).astype(np.int64)  # rounded up to a power of two, it carries
    return np.where(np.isnan(x), 0x7F, code | np.signbit(x) * 0x80).astype(np.uint32)


def _f16_of_e4m3(byte: np.ndarray) -> np.ndarray:
    magnitude = ((byte & np.uint32(0x7F)) << np.uint32(7)).astype(np.uint16).view(np.float16).astype(np.float64) * 2.0**8
    magnitude = np.where(byte & np.uint32(0x7F) == 0x7F, np.nan, magnitude)
    return np.where(np.isnan(magnitude), np.uint32(0x7FFF), _bits(magnitude, "f16") | (byte & np.uint32(0x80)) << np.uint32(8))


def _to_double(bits: np.ndarray, kind: str) -> np.ndarray:
    bits = np.asarray(bits, np.uint32)
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits << np.uint32(16) if kind == "bf16" else bits).view(np.float32).astype(np.float64)


def _bits(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        bits = x.astype(np.float16).view(np.uint16).astype(np.uint32)
    elif kind == "f32":
        bits = x.astype(np.float32).view(np.uint32)
    else:  # to nearest even on the upper half of a float32 that keeps what was cut off as a last bit
        single = x.astype(np.float32)
        wide = single.view(np.uint32)
        inexact = single.astype(np.float64) != x
        too_large = np.abs(single.astype(np.float64)) > np.abs(x)
        wide = np.where(inexact & too_large, wide - 1, wide) | (inexact & np.isfinite(x)).astype(np.uint32)
        bits = (wide + np.uint32(0x7FFF) + (wide >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(CANONICAL_NAN[kind]), bits).astype(np.uint32)
