"""The layouts of the Blackwell engines: byte by byte against index arithmetic in plain Python, back, and what an engine computes with the scalars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import assert_close_rel, assert_equal_bits, peak_bytes
from random_experts import make_experts

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.experts import GEGLU, GPT_OSS_SWIGLU, RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.formats import e2m1
from halfbyte.kernels.reference.activation import activate
from halfbyte.weights.engines.common import EngineExperts
from halfbyte.weights.engines.cutlass import CUTLASS
from halfbyte.weights.engines.trtllm_gen import TRTLLM_GEN


def on_gpu(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")(test))


both_layouts = pytest.mark.parametrize("layout", [TRTLLM_GEN, CUTLASS], ids=["trtllm_gen", "cutlass"])
both_formats = pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
both_kinds = pytest.mark.parametrize("activation", [SWIGLU, RELU2], ids=["gated", "plain"])

# (experts, hidden, intermediate)
SIZES = [(1, 256, 128), (7, 64, 48), (32, 48, 96), (2, 32, 1408), (1, 160, 2688), (2, 2880, 64)]
SIZES_OF = {hb.NVFP4: SIZES, hb.MXFP4: [(e, -(-h // 32) * 32, -(-i // 32) * 32) for e, h, i in SIZES]}
SIZED_FORMATS = [pytest.param(*sizes, format, id=f"{format!r}-{sizes}") for format, all_sizes in SIZES_OF.items() for sizes in all_sizes]

# H and I are padded to multiples of these: (layout, format, gated).
PADDING = {
    (TRTLLM_GEN, hb.NVFP4, True): (256, 128),
    (TRTLLM_GEN, hb.NVFP4, False): (512, 128),
    (TRTLLM_GEN, hb.MXFP4, True): (256, 256),
    (TRTLLM_GEN, hb.MXFP4, False): (512, 256),
    (CUTLASS, hb.NVFP4, True): (32, 128),
    (CUTLASS, hb.NVFP4, False): (32, 128),
    (CUTLASS, hb.MXFP4, True): (128, 128),
    (CUTLASS, hb.MXFP4, False): (128, 128),
}


def packed(layout: ModuleType, w: ExpertWeights) -> EngineExperts:
    out = layout.allocate(w, w.device)
    layout.pack(w, out)
    return out


def slow_row_order(rows: int, gated: bool) -> list[int]:
    """The two steps by which FlashInfer defines it: interleave the halves, then shuffle inside blocks of 32. out[new] = in[order[new]]."""
    interleaved = list(range(rows))
    if gated:
        for i in range(rows // 2):
            interleaved[2 * i], interleaved[2 * i + 1] = i, rows // 2 + i
    return [interleaved[new // 32 * 32 + 4 * (new % 8) + new % 32 // 8] for new in range(rows)]


def slow_matrix(rows: list[bytes], halves: int, padded_half: int, padded_width: int, shuffled: bool) -> list[bytes]:
    """Rows [gate; up] of bytes to rows [up; gate] with zeros after each half and each row, in the engine's order."""
    half = len(rows) // halves
    parts = [rows[half * index : half * (index + 1)] for index in range(halves)]
    padded = [row + bytes(padded_width - len(row)) for part in reversed(parts) for row in part + [b""] * (padded_half - half)]
    return [padded[old] for old in slow_row_order(len(padded), halves == 2)] if shuffled else padded


def slow_swizzle(rows: list[bytes]) -> bytes:
    """128x4: flat(r, c) of section 1.5's formula, byte by byte."""
    padded_rows, columns = -(-len(rows) // 128) * 128, len(rows[0])
    assert columns % 4 == 0
    out = bytearray(padded_rows * columns)
    for r, row in enumerate(rows):
        for c, byte in enumerate(row):
            out[(r // 128) * (columns // 4) * 512 + (c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4] = byte
    return bytes(out)


def rows_of(matrix: torch.Tensor) -> list[bytes]:
    return [bytes(row) for row in matrix.view(torch.uint8).tolist()]


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@both_layouts
@both_kinds
@pytest.mark.parametrize(("num_experts", "hidden", "intermediate", "format"), SIZED_FORMATS)
def test_every_byte_is_where_the_definition_says(
    layout: ModuleType, activation: Activation, num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat
) -> None:
    w = make_experts(num_experts, hidden, intermediate, format, activation)
    out = packed(layout, w)
    multiple_h, multiple_i = PADDING[layout, format, activation.gated]
    padded_h, padded_i, halves = round_up(hidden, multiple_h), round_up(intermediate, multiple_i), 2 if activation.gated else 1
    assert (out.padded_hidden, out.padded_intermediate, out.hidden, out.intermediate) == (padded_h, padded_i, hidden, intermediate)
    assert out.w13_codes.shape == (num_experts, halves * padded_i, padded_h // 2) and out.w2_codes.shape == (num_experts, padded_h, padded_i // 2)
    for expert in sorted({0, num_experts // 2, num_experts - 1}):
        for name, halves_, padded_half, padded_k in (("w13", halves, padded_i, padded_h), ("w2", 1, padded_h, padded_i)):
            codes, scales = (slow_matrix_of(getattr(w, name), expert, part, halves_, padded_half, padded_k, layout) for part in ("codes", "scales"))
            assert rows_of(getattr(out, f"{name}_codes")[expert]) == codes
            assert b"".join(rows_of(getattr(out, f"{name}_scales")[expert])) == slow_swizzle(scales)


def slow_matrix_of(w: hb.QuantTensor, expert: int, part: str, halves: int, padded_half: int, padded_k: int, layout: ModuleType) -> list[bytes]:
    width = padded_k // 2 if part == "codes" else round_up(padded_k // w.format.block, 4)
    return slow_matrix(rows_of(getattr(w, part)[expert]), halves, padded_half, width, layout is TRTLLM_GEN)


@pytest.mark.parametrize("rows", [0, 32, 64, 96, 192, 1024, 2816])
@pytest.mark.parametrize("gated", [True, False])
def test_row_order(rows: int, gated: bool) -> None:
    order = hb.trtllm_gen_row_order(rows, gated)
    assert order.tolist() == slow_row_order(rows, gated)
    if gated:  # the closed form of section 3.1
        new = [32 * b + 16 * p + 8 * h + i for b in range(rows // 32) for p in range(2) for h in range(2) for i in range(8)]
        old = [h * rows // 2 + 16 * b + 2 * i + p for b in range(rows // 32) for p in range(2) for h in range(2) for i in range(8)]
        assert order[new].tolist() == old
    order.fill_(-1)  # nothing is shared with the next caller
    assert hb.trtllm_gen_row_order(rows, gated).tolist() == slow_row_order(rows, gated)


@pytest.mark.parametrize("rows", [-32, 16, 33])
def test_row_order_of_part_of_a_block(rows: int) -> None:
    with pytest.raises(InputError, match=r"multiple of 32|an integer of at least 0"):
        hb.trtllm_gen_row_order(rows, gated=False)


@both_layouts
@both_kinds
@pytest.mark.parametrize(("num_experts", "hidden", "intermediate", "format"), [*SIZED_FORMATS, (0, 64, 64, hb.NVFP4), (17, 64, 32, hb.MXFP4)])
def test_unpack_gives_every_byte_back(
    layout: ModuleType, activation: Activation, num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat
) -> None:
    w = with_input_scales(make_experts(num_experts, hidden, intermediate, format, activation))
    w = replace(w, first_expert=3, num_global_experts=num_experts, w2_bias=w.w2_bias.bfloat16())
    out = packed(layout, w)
    back = layout.unpack(out)
    for tensor in out.tensors.values():  # nothing is shared with the storage
        tensor.view(torch.uint8).fill_(0xAB)
    assert (back.activation, back.first_expert, back.num_global_experts) == (activation, 3, num_experts)
    assert list(back.tensors) == list(w.tensors)
    for name, tensor in w.tensors.items():
        assert_equal_bits(back.tensors[name], tensor)


@both_layouts
@both_kinds
@both_formats
def test_meta(layout: ModuleType, activation: Activation, format: hb.BlockFormat) -> None:
    w = make_experts(3, 96, 64, format, activation)
    storage, on_meta = layout.allocate(w, "cpu"), packed(layout, w.to("meta"))
    assert {name: (t.shape, t.dtype) for name, t in on_meta.tensors.items()} == {name: (t.shape, t.dtype) for name, t in storage.tensors.items()}
    back = layout.unpack(on_meta)
    assert back.device.type == "meta" and back.w13.shape == w.w13.shape


@both_layouts
@both_formats
def test_storage_is_written_whole_and_where_it_lies(layout: ModuleType, format: hb.BlockFormat) -> None:
    """A reload into storage full of garbage, by slices of experts, from tensors that are not aligned: same addresses, same bytes."""
    w = with_input_scales(make_experts(11, 96, 96, format))
    expected = packed(layout, w)
    for tensor in expected.tensors.values():
        assert tensor.is_contiguous()
    out = layout.allocate(w, "cpu")
    for tensor in out.tensors.values():
        tensor.view(torch.uint8).fill_(0xAB)
    addresses = {name: tensor.data_ptr() for name, tensor in out.tensors.items()}
    for first, last in ((9, 11), (0, 1), (1, 9)):
        layout.pack(slice_of(w, first, last, misaligned), out, first)
    assert {name: tensor.data_ptr() for name, tensor in out.tensors.items()} == addresses
    for name, tensor in expected.tensors.items():
        assert_equal_bits(out.tensors[name], tensor)
    for tensor in expected.tensors.values():  # what an earlier call made has no influence on a later one
        tensor.view(torch.uint8).fill_(0xAB)
    for name, tensor in packed(layout, w).tensors.items():
        assert_equal_bits(tensor, out.tensors[name])
    same = out.with_tensors(out.tensors)
    assert {name: tensor.data_ptr() for name, tensor in same.tensors.items()} == addresses


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.element_size() > 1:
        return tensor
    flat = torch.empty(tensor.numel() + 1, dtype=torch.uint8)[1:].view(tensor.dtype).view(tensor.shape)
    return flat.copy_(tensor) if tensor.dtype == torch.uint8 else flat.view(torch.uint8).copy_(tensor.view(torch.uint8)).view(tensor.dtype)


def slice_of(w: ExpertWeights, first: int, last: int, change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> ExpertWeights:
    """Some of the experts; input scales stay those of the whole layer."""
    tensors = {name: tensor if name.endswith("input_scale") else change(tensor[first:last]) for name, tensor in w.tensors.items()}
    return w.with_tensors(tensors)


def with_input_scales(w: ExpertWeights) -> ExpertWeights:
    if w.format is not hb.NVFP4:
        return w
    columns = (2,) if w.activation.gated else ()
    random = torch.Generator().manual_seed(1)
    scales = torch.rand(w.num_experts, *columns, generator=random) + 0.1, torch.rand(w.num_experts, generator=random) + 0.1
    return replace(w, w13_input_scale=scales[0], w2_input_scale=scales[1])


@both_layouts
@both_formats
def test_packing_needs_one_expert_of_memory_beside_the_result(layout: ModuleType, format: hb.BlockFormat, tmp_path: Path) -> None:
    w = replace(make_experts(64, 256, 128, format), w13_bias=None, w2_bias=None)
    out = layout.allocate(w, "cpu")
    one_expert = sum(tensor[0].nbytes for tensor in out.tensors.values())
    assert peak_bytes(lambda: layout.pack(w, out), tmp_path) <= one_expert
    canonical = w.nbytes
    assert canonical * 0.9 < peak_bytes(lambda: layout.unpack(out), tmp_path) <= canonical + one_expert


def test_scalars_of_trtllm_gen() -> None:
    w = with_input_scales(make_experts(5, 64, 64, hb.NVFP4))
    a13, a2 = w.w13_input_scale.max(), w.w2_input_scale.max()
    gate, up, down = w.w13.global_scale[:, 0], w.w13.global_scale[:, 1], w.w2.global_scale
    out = packed(TRTLLM_GEN, w)
    assert_equal_bits(out.w13_input_scale_quant, (1 / a13).expand(5))
    assert_equal_bits(out.g1_alphas, a13 * gate)
    assert_equal_bits(out.g1_scale_c, (1 / a2) * (a13 * up))
    assert_equal_bits(out.g2_alphas, a2 * down)
    assert out.gemm1_alpha is None and out.gemm1_beta is None and out.gemm1_clamp_limit is None and out.w2_input_scale_quant is None
    equal = replace(w, activation=GPT_OSS_SWIGLU, w13=replace(w.w13, global_scale=gate))
    out = packed(TRTLLM_GEN, equal)
    assert_equal_bits(out.gemm1_clamp_limit, 7.0 / (a13 * gate))
    assert_equal_bits(out.gemm1_beta, 1.0 / (a13 * gate))
    assert_equal_bits(out.gemm1_alpha, torch.full((5,), 1.702))
    plain = with_input_scales(make_experts(5, 64, 64, hb.NVFP4, RELU2))
    assert_equal_bits(packed(TRTLLM_GEN, plain).g1_scale_c, (1 / plain.w2_input_scale.max()).expand(5))


def test_scalars_of_cutlass() -> None:
    w = with_input_scales(make_experts(5, 64, 64, hb.NVFP4, GPT_OSS_SWIGLU))
    w = replace(w, w13=replace(w.w13, global_scale=w.w13.global_scale[:, :1].expand(5, 2).contiguous()))
    a13, a2 = w.w13_input_scale.max(), w.w2_input_scale.max()
    out = packed(CUTLASS, w)
    assert_equal_bits(out.w13_input_scale_quant, (1 / a13).expand(5))
    assert_equal_bits(out.w2_input_scale_quant, (1 / a2).expand(5))
    assert_equal_bits(out.g1_alphas, a13 * w.w13.global_scale[:, 0])
    assert_equal_bits(out.g2_alphas, a2 * w.w2.global_scale)
    assert_equal_bits(out.w13_bias[:, :64], w.w13_bias[:, 64:])  # up first, each half padded to 128
    assert_equal_bits(out.w13_bias[:, 128:192], w.w13_bias[:, :64])
    assert [float(scalar[0]) for scalar in (out.gemm1_alpha, out.gemm1_beta, out.gemm1_clamp_limit)] == pytest.approx([1.702, 1.0, 7.0])
    assert out.g1_scale_c is None


@both_layouts
def test_mxfp4_has_no_scales_to_fold(layout: ModuleType) -> None:
    out = packed(layout, make_experts(2, 64, 64, hb.MXFP4, GPT_OSS_SWIGLU))
    scalars = (out.g1_alphas, out.g2_alphas, out.w13_input_scale_quant, out.g1_scale_c, out.w2_input_scale_quant, out.gemm1_beta)
    assert all(bool((scalar == 1).all()) for scalar in scalars if scalar is not None)
    assert out.gemm1_clamp_limit.tolist() == [7.0, 7.0]


def engine_output(layout: ModuleType, out: EngineExperts, x: torch.Tensor, expert: int) -> torch.Tensor:
    """What the engine's equations give for x [T, H], in fp64, without rounding activations to FP4: from the stored bytes and scalars alone."""

    def values(name: str, gated: bool) -> torch.Tensor:
        codes, scales = getattr(out, f"{name}_codes")[expert], getattr(out, f"{name}_scales")[expert]
        rows, columns = codes.shape[0], codes.shape[1] * 2
        linear = hb.unswizzle_scales(scales, "128x4", rows, columns // out.format.block)
        value = e2m1.decode_packed(codes).double().unflatten(-1, (-1, out.format.block)) * out.format.decode_scales(linear).double().unsqueeze(-1)
        return in_order(value.flatten(-2), gated)

    def in_order(rows: torch.Tensor, gated: bool) -> torch.Tensor:
        if layout is CUTLASS:
            return rows
        return torch.empty_like(rows).index_copy_(0, torch.tensor(slow_row_order(len(rows), gated)), rows)

    def scalar(tensor: torch.Tensor | None, default: float) -> torch.Tensor | float:
        return default if tensor is None else tensor[expert].double()

    gated = out.activation.gated
    padded = torch.zeros(len(x), out.padded_hidden, dtype=torch.float64)
    padded[:, : out.hidden] = x
    accumulator = (padded * out.w13_input_scale_quant[expert].double()) @ values("w13", gated).T
    bias13 = in_order(out.w13_bias[expert].double(), gated)
    bias2 = in_order(out.w2_bias[expert].double(), False)
    g1, g2 = scalar(out.g1_alphas, 1), scalar(out.g2_alphas, 1)
    alpha, beta, limit = scalar(out.gemm1_alpha, 1.0), scalar(out.gemm1_beta, 0.0), scalar(out.gemm1_clamp_limit, torch.inf)
    plain = replace(out.activation, alpha=float(alpha), beta=0.0, limit=None)  # act(gate) * 1

    def activated_gate(gate: torch.Tensor) -> torch.Tensor:
        return activate(torch.cat([gate, torch.ones_like(gate)], dim=-1), plain) if gated else activate(gate, plain)

    accumulator = accumulator + bias13 if layout is TRTLLM_GEN else accumulator * g1 + bias13
    if gated:
        up, gate = accumulator.chunk(2, dim=-1)
        up, gate = up.clamp(-limit, limit) + beta, gate.clamp(max=limit)
    else:
        up, gate = 1.0, accumulator
    if layout is TRTLLM_GEN:
        h = scalar(out.g1_scale_c, 1) * up * activated_gate(gate * g1)
        return ((h @ values("w2", False).T + bias2) * g2)[:, : out.hidden]
    h = up * activated_gate(gate) * scalar(out.w2_input_scale_quant, 1)
    return (h @ values("w2", False).T * g2 + bias2)[:, : out.hidden]


@both_layouts
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "per token"])
@pytest.mark.parametrize(
    ("format", "activation", "equal_scales"),
    [
        *((hb.NVFP4, activation, True) for activation in (SWIGLU, GPT_OSS_SWIGLU, GEGLU, RELU2)),
        *((hb.NVFP4, activation, False) for activation in (SWIGLU, Activation("swiglu", 1.702, 0.5), GEGLU)),
        *((hb.MXFP4, activation, True) for activation in (SWIGLU, GPT_OSS_SWIGLU, RELU2)),
    ],
    ids=str,
)
def test_the_engine_computes_the_canonical_layer(
    layout: ModuleType, format: hb.BlockFormat, activation: Activation, equal_scales: bool, calibrated: bool
) -> None:
    w = make_experts(3, 96, 96, format, activation)
    if format is hb.NVFP4 and activation.gated:
        ratio = torch.ones(3) if equal_scales else torch.tensor([0.3, 1.7, 5.0])
        gate = w.w13.global_scale[:, 0] / 1000  # so that accumulators straddle the limit
        w = replace(w, w13=replace(w.w13, global_scale=torch.stack([gate, gate * ratio], dim=1)))
    if format is hb.MXFP4:
        w = replace(w, w13=replace(w.w13, scales=w.w13.scales - 6))
    if calibrated:
        w = with_input_scales(w)
    out, dense = packed(layout, w), w.dequantize(torch.float64)
    x = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for expert in range(3):
        h = activate(x @ dense.w13[expert].T + w.w13_bias[expert].double(), activation)
        expected = h @ dense.w2[expert].T + w.w2_bias[expert].double()
        assert_close_rel(engine_output(layout, out, x, expert), expected, token=1e-5, overall=1e-5)


def spoiled(w: ExpertWeights, name: str, value: float | int, row: int = 0) -> ExpertWeights:
    tensors = {key: tensor.clone() for key, tensor in w.tensors.items()}
    target = tensors[name]
    (target.view(torch.uint8) if name.endswith(".scales") else target).view(len(target), -1)[-1, row] = value
    return w.with_tensors(tensors)


OTHER_ROWS = torch.ones(2, 4)
BAD_WEIGHTS = {
    "dense": (lambda w: w.dequantize(), "holds FP4 weights .given dense experts"),
    "NaN block scale": (lambda w: spoiled(w, "w13.scales", 0x7F), "w13 has block scales that are negative or NaN .given 1 of "),
    "negative block scale": (lambda w: spoiled(w, "w2.scales", 0x81, 5), "w2 has block scales that are negative or NaN .given 1 of "),
    "scales in tiles": (lambda w: replace(w, w2=w.w2.with_scale_layout("128x4")), "w2 has its block scales in tiles .given '128x4'"),
    "NaN global scale": (lambda w: spoiled(w, "w13.global_scale", torch.nan, 1), r"w13.global_scale is not usable \(given 1 of 4"),
    "zero global scale": (lambda w: spoiled(w, "w2.global_scale", 0.0), r"w2.global_scale is not usable \(given 1 of 2"),
    "negative input scale": (lambda w: spoiled(w, "w2_input_scale", -1.0), "w2_input_scale is not usable"),
    "input scales of some experts": (
        lambda w: replace(w, w2_input_scale=w.w2_input_scale[:1]),
        r"w2_input_scale does not fit \(given \(1,\); needed \(2,\)",
    ),
    "four global scales": (
        lambda w: replace(w, w13=replace(w.w13, global_scale=torch.ones(2, 4))),
        r"w13.global_scale does not fit \(given \(2, 4\)",
    ),
    "other sizes": (lambda w: with_input_scales(make_experts(2, 64, 96, hb.NVFP4)), "the experts do not fit the storage"),
    "other format": (lambda w: make_experts(2, 64, 64, hb.MXFP4), "the experts do not fit the storage"),
    "no bias": (lambda w: replace(w, w2_bias=None), "the experts do not fit the storage"),
    "bias of another dtype": (lambda w: replace(w, w2_bias=w.w2_bias.bfloat16()), "the experts do not fit the storage"),
    "no column for up": (lambda w: replace(w, w13_input_scale=w.w13_input_scale[:, 0]), "the experts do not fit the storage"),
}


@both_layouts
@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_refused_before_anything_is_written(layout: ModuleType, kind: str) -> None:
    w = with_input_scales(make_experts(2, 64, 64, hb.NVFP4))
    out = layout.allocate(w, "cpu")
    for tensor in out.tensors.values():
        tensor.view(torch.uint8).fill_(0xAB)
    spoil, message = BAD_WEIGHTS[kind]
    with pytest.raises(InputError, match=message):
        layout.pack(spoil(w), out)
    assert all(bool((tensor.view(torch.uint8) == 0xAB).all()) for tensor in out.tensors.values())


@both_layouts
@pytest.mark.parametrize("first", [-1, 1])
def test_experts_beyond_the_storage_are_refused(layout: ModuleType, first: int) -> None:
    w = make_experts(2, 64, 64, hb.NVFP4)
    with pytest.raises(InputError, match=f"no room for these experts .given experts {first} to {first + 2}; needed 0 to 2"):
        layout.pack(w, layout.allocate(w, "cpu"), first)


@both_layouts
def test_one_limit_for_two_scales_is_refused(layout: ModuleType) -> None:
    w = make_experts(3, 64, 64, hb.NVFP4, GPT_OSS_SWIGLU)
    with pytest.raises(InputError, match=r"one clamp limit .*limit 7, different scales in 3 of 3 experts.*'canonical' or 'hopper'"):
        packed(layout, w)


@both_layouts
def test_allocate_refuses_what_pack_would(layout: ModuleType) -> None:
    with pytest.raises(InputError, match="dense experts"):
        layout.allocate(make_experts(1, 64, 64, hb.NVFP4).dequantize(), "meta")


@on_gpu
@both_layouts
@both_formats
@both_kinds
def test_gpu_storage_is_that_of_the_cpu(layout: ModuleType, format: hb.BlockFormat, activation: Activation) -> None:
    w = with_input_scales(make_experts(11, 288, 96, format, activation))
    expected = packed(layout, w)
    for source in (w, w.to("cuda")):  # across devices, one expert at a time, and on the GPU
        out = layout.allocate(w, "cuda")
        layout.pack(source, out)
        for name, tensor in expected.tensors.items():
            assert_equal_bits(out.tensors[name].cpu(), tensor)
        back = layout.unpack(out)
        for name, tensor in w.tensors.items():
            assert_equal_bits(back.tensors[name].cpu(), tensor)


@on_gpu
@both_layouts
def test_packing_on_a_gpu_needs_one_expert_of_memory(layout: ModuleType) -> None:
    w = replace(make_experts(32, 1024, 512, hb.NVFP4), w13_bias=None, w2_bias=None).to("cuda")
    out = layout.allocate(w, "cuda")
    layout.pack(w, out)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layout.pack(w, out)
    one_expert = sum(tensor[0].nbytes for tensor in out.tensors.values())
    assert torch.cuda.max_memory_allocated() - before <= one_expert
