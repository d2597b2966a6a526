"""What the grouped GEMMs do to an accumulator tile [64 weight rows, tokens] before they store it (Gluon)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Kinds of `experts.Activation` as numbers: Gluon passes no strings to warp-specialised functions.
KINDS = {"swiglu": 0, "geglu": 1, "geglu_tanh": 2, "relu2": 3}
SWIGLU, GEGLU, GEGLU_TANH, RELU2 = (gl.constexpr(number) for number in KINDS.values())


@gluon.jit
def split_halves(accumulator, TOKENS: gl.constexpr):
    """[64, TOKENS] in an MMA layout to the rows of half 0 and of half 1, [32, TOKENS] each (row 8 w + g); stays in registers."""
    halves = gl.permute(gl.reshape(accumulator, (4, 2, 8, TOKENS)), (0, 2, 3, 1))
    first, second = gl.split(halves)
    return gl.reshape(first, (32, TOKENS)), gl.reshape(second, (32, TOKENS))


@gluon.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) to a few units in the last place of fp32: two instructions of the special function unit, where the compiler's own exp and
    division spend a dozen on ranges that cannot matter here (an overflowing exponential gives exactly 0)."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def activate(gate, up, KIND: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr):
    """The formulas of `experts.Activation`, fp32; LIMIT 0 for none. relu2 has no gate: it squares relu(gate)."""
    if KIND == SWIGLU:
        if LIMIT > 0:
            gate = gl.minimum(gate, LIMIT)
            up = gl.minimum(gl.maximum(up, -LIMIT), LIMIT)
        result = (up + BETA) * gate * _sigmoid(ALPHA * gate)
    elif KIND == GEGLU:
        result = 0.5 * gate * (1.0 + gl.erf(gate * 0.7071067811865476)) * up
    elif KIND == GEGLU_TANH:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        result = gate * _sigmoid(2.0 * inner) * up  # 0.5 (1 + tanh(y)) = sigmoid(2 y)
    else:
        positive = gl.maximum(gate, 0.0)
        result = positive * positive
    return result
