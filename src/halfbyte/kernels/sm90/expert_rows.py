"""Both products of the layer on Hopper, up to and without the weighted sum: rows [T * k, H] bf16 in the order of a work list.

    few tokens per expert    GEMM1, GEMM2 (decode; direct: without a work list)
    many                     gather, GEMM1, GEMM2 (prefill)
    many, fp8                quantise tokens, GEMM1, quantise rows, GEMM2 (prefill on fp8 tensor cores)

Activations "mxfp8" and "nvfp4", and "fp8" where memory limits and fp8 tensor cores gain nothing (`configs.MIN_FP8_ROWS`): the W4A16 kernels on
quantised activations, which bf16 holds exactly, and exact weights. Two more launches, `encode_rows` before each GEMM, which move 4 T H and 4 R I
bytes; none where the direct kernel rounds to fp8 itself (`rows_in_shared`). That is never faster than "bf16": it is for the numbers that a Blackwell
GPU would give. On fp8 tensor cores weights are rounded to e4m3 too (`weights.hopper.rounding_fp8`): `rounds_weights`. Hidden states that arrive
quantised are decoded into bf16, which holds them exactly but for one scale per row, by `gather` or (few tokens) by a launch of its own; one-scale fp8
goes to fp8 tensor cores as it is.

h gets one scale per row, which needs the largest value of the whole row and so a pass of its own. It moves 3 R I bytes where GEMM2 computes 2 R H I
operations: at 3 TB/s and 1.3 Pflop/s 650 / H of GEMM2's time, 3 % of a DeepSeek-R1 layer and 10 % of a Qwen3-30B one. A scale for every 64 columns
would save 2 of the 3 bytes and cost GEMM2 a multiply-add on every accumulator at every step: at 128 tokens 64 of them per thread, twice the decoding.

Workspace, `scratch`: with R = T * k rows, 2 R I bytes and 2 R H bytes (direct: 4 R H per part), and for fp8 R I more: `workspace_nbytes`. The rows
that prefill's GEMM1 reads lie where those of GEMM2 will.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch

from halfbyte.device import Target
from halfbyte.formats import NVFP4
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.formats.fp8_tensor import Fp8Tensor
from halfbyte.gluon_compat import TensorDescriptor, fix_cache_keys, tma_descriptor
from halfbyte.kernels.arithmetic import ceil_div, next_power_of_2
from halfbyte.kernels.launch import launch
from halfbyte.kernels.problem import Hidden, Problem, Size, Support, layer_problem
from halfbyte.kernels.shared.decode_rows import decode_rows
from halfbyte.kernels.shared.encode_rows import encode_rows
from halfbyte.kernels.sm90.configs import DIRECT, Config, DecodeConfig, PrefillConfig, choose_config, configs, rivals, rounds_weights, sources, takes
from halfbyte.kernels.sm90.decode_spec import DecodeSpec, DecodeTensors
from halfbyte.kernels.sm90.epilogue import KINDS
from halfbyte.kernels.sm90.gather import gather
from halfbyte.kernels.sm90.gemm_decode import NUM_WARPS, grouped_gemm_w4a16_decode
from halfbyte.kernels.sm90.gemm_prefill import grouped_gemm_prefill
from halfbyte.kernels.sm90.prefill_spec import PrefillSpec, derived
from halfbyte.kernels.sm90.quantize_rows import gather_codes, quantize_rows, quantize_tokens
from halfbyte.kernels.sm90.rows_in_shared import tiles_in_shared
from halfbyte.kernels.work_list import WorkList
from halfbyte.kernels.workspace import aligned, kept_in_workspace, scratch
from halfbyte.weights.hopper.bits import TILE
from halfbyte.weights.hopper.layout import HopperExperts, HopperMatrix, padded_size

__all__ = [  # what the table reads
    "choose_config", "configs", "layout", "rivals", "rounds_weights", "run", "sources", "supports", "takes", "workspace_nbytes",
]  # fmt: skip

fix_cache_keys(grouped_gemm_w4a16_decode, grouped_gemm_prefill)

# The direct kernel divides the columns of w2 among this many programs where there are that many columns. One token takes 22 to 27 % less with
# Mixtral's 14,336 and 10 % less with gpt-oss' 2,880, but 6 % more with DeepSeek-R1's 2,048 (H100 and H200, 2026-11-26).
W2_PARTS = 4
MIN_COLUMNS_OF_PARTS = 2816

# Per thread. With 64 a multiprocessor holds eight programs: two tokens of DeepSeek-R1, whose w13 has 7.8 for each, take 101 us, with 66 (seven
# programs) 116. Those of the direct w2 start while w13 is at work: with 64 one token takes 61.8 us, with 72 (seven) 60.0 (H200, 2026-11-27).
DECODE_REGISTERS = 64
WIDE_REGISTERS = 72  # without slices, of the direct w2, and of the direct w13 with a scale per row, which would keep some in memory

# Triton 3.7 and newer ask ptxas for level 2 of the register allocation, with which the ptxas 13.4 of Triton 3.9 spills up
# to 376 bytes per thread of the prefill kernels. The last of two levels counts, and 4 is what ptxas does unasked. Older ones (12.8, 12.9) ignore it.
PTXAS_OPTIONS = "--regAllocOptLevel=4"

# 64 columns of a row of x each, that a program of the direct kernel keeps in shared memory: 24 KiB leave room for eight programs. With 28 KiB two
# tokens of DeepSeek-R1 take 17 % more (bf16) or 4 % less (fp8), with 32 four of Qwen3-235B 1 % more or 1.5 % less (H200, 2026-11-30).
MAX_TILES_IN_SHARED = 192

# As long as all warps of the direct kernel fit into a GPU of 132 multiprocessors at once, it has two slices of the columns: a warp alone on its
# scheduler issues an instruction every five to six cycles only. A constant, so that what is compiled does not depend on the GPU. One token takes 9 %
# less of DeepSeek-R1, 16 % of Qwen3-235B, 14 % of Qwen3-30B, 11 % of gpt-oss (H200, 2026-11-30).
MAX_WARPS_WITH_SLICES = 132 * 32


def supports(problem: Problem) -> Support:
    if problem.layout not in ("hopper", "hopper_fp8"):
        return Support.no(f"reads layouts 'hopper' and 'hopper_fp8', the weights are in {problem.layout!r}")
    if problem.format is None:
        return Support.no("reads NVFP4 and MXFP4 weights, these are dense")
    if problem.target.arch != "sm_90":
        return Support.no(f"needs compute capability 9.0, this is {problem.target.arch}")
    if problem.quantized is None and problem.dtype not in (None, torch.bfloat16):
        return Support.no(f"multiplies bf16, hidden is {problem.dtype}: pass hidden.bfloat16()")
    return Support.yes("FP4 experts in register fragments, on Hopper's tensor cores")


def layout(problem: Problem) -> str:
    return "hopper_fp8" if problem.activations == "fp8" else "hopper"


def problem_of(op: str, hidden: Hidden, experts: HopperExperts, activations: ActivationFormat, batch_invariant: bool = False) -> Problem:
    layout = "hopper_fp8" if experts.words_for == "fp8" else "hopper"
    return layer_problem(op, experts, Target.of(experts.device), layout, activations, hidden, batch_invariant=batch_invariant)


def run(
    hidden: Hidden,
    experts: HopperExperts,
    work: WorkList | torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    expert_offset: int = 0,
    config: Config | None = None,
) -> torch.Tensor:
    """hidden [T, H] bf16 or quantised to rows [T * k, H] bf16; `work` has items of at most `config.max_rows` rows.

    With `configs.DIRECT`, which `fused_moe` takes: `work` is the expert ids [T, k] themselves, the row of slot s is at s, the first slot of its token
    that names the expert, and rows are fp32 [parts * T * k, H], the parts to be added up.
    """
    num_rows, device = work.numel() if isinstance(work, torch.Tensor) else work.row_of_slot.shape[0], experts.device
    if config is None:
        config = choose_config(problem_of("expert_rows", hidden, experts, activations), Size(num_rows))
    if not isinstance(config, PrefillConfig):
        h, rows = _decode_memory(num_rows, experts.hidden, experts.intermediate, config, device)
        if isinstance(hidden, torch.Tensor):
            _decode_gemm(hidden, None, activations, h, experts, work, expert_offset, is_w13=True)
        else:
            _decode_gemm(*decode_rows(hidden), "bf16", h, experts, work, expert_offset, is_w13=True)
        _decode_gemm(h, None, activations, rows, experts, work, expert_offset, is_w13=False)
        return rows
    assert not isinstance(work, torch.Tensor), "only the direct kernel finds its rows in the ids"
    memory = _prefill_memory(num_rows, experts.hidden, experts.intermediate, config, device)
    if config.fp8:
        _prefill_fp8(hidden, experts, work, memory, config)
    else:
        _prefill(hidden, experts, work, memory, activations, config)
    return memory.rows


class DirectShape(NamedTuple):
    """What the direct kernel is compiled for beside the layer: slices of the columns, and `DecodeSpec.rows_in_shared`."""

    slices: int
    rows_in_shared: int


def direct_shapes(problem: Problem, size: Size) -> tuple[DirectShape, DirectShape]:
    """Of w13 and of w2."""
    halves = 2 if problem.gated else 1
    inner, hidden = ceil_div(problem.intermediate, TILE), ceil_div(problem.hidden, TILE)
    parts = _parts_of_w2(problem.intermediate)
    return _direct_shape(size, halves * inner, hidden, 1), _direct_shape(size, hidden, inner, parts)


def _parts_of_w2(intermediate: int) -> int:
    """How many programs of the direct kernel share the columns of w2."""
    return W2_PARTS if intermediate >= MIN_COLUMNS_OF_PARTS else 1


def _direct_shape(size: Size, row_tiles: int, column_tiles: int, parts: int) -> DirectShape:
    """Of a matrix of so many tiles; a slice has a run of four at least."""
    num_warps = NUM_WARPS * size.num_rows * row_tiles * parts
    slices = 2 if 2 * num_warps <= MAX_WARPS_WITH_SLICES and column_tiles // parts >= 8 else 1
    rows = next_power_of_2(size.num_tokens)
    return DirectShape(slices, rows if rows * tiles_in_shared(column_tiles, parts, slices) <= MAX_TILES_IN_SHARED else 0)


def workspace_nbytes(problem: Problem, size: Size, config: Config) -> int:
    """What `run` takes of a workspace."""
    rows, tokens, hidden = size.num_rows, size.num_tokens, problem.hidden
    intermediate = padded_size(problem.intermediate)
    parts = _parts_of_w2(problem.intermediate) if config == DIRECT else 1
    sizes = [2 * rows * intermediate, parts * rows * hidden * (4 if config == DIRECT else 2)]
    if isinstance(config, PrefillConfig) and config.fp8:
        return sum(map(aligned, (*sizes, rows * intermediate, 4 * rows, 4 * rows)))
    is_encoded = problem.activations != "bf16" if problem.quantized is None else not isinstance(config, PrefillConfig)
    if config == DIRECT and problem.quantized is None and problem.activations == "fp8":
        is_encoded = direct_shapes(problem, size)[0].rows_in_shared == 0
    if is_encoded:  # or decoded, where no gather does it
        sizes.append(2 * tokens * hidden)
    if isinstance(config, PrefillConfig) and padded_size(hidden) > hidden:
        sizes.append(2 * rows * padded_size(hidden))
    scales = [4 * tokens, 4 * rows, 4 * rows]  # of hidden, of x and of h, where there are some
    return sum(map(aligned, (*sizes, *scales)))


@kept_in_workspace
def _decode_memory(num_rows: int, hidden: int, intermediate: int, config: DecodeConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of both GEMMs."""
    h = scratch((num_rows, padded_size(intermediate)), torch.bfloat16, device)
    parts, dtype = (_parts_of_w2(intermediate), torch.float32) if config.direct else (1, torch.bfloat16)
    return h, scratch((parts * num_rows, hidden), dtype, device)


class PrefillMemory(NamedTuple):
    """Input and result of both GEMMs: x, h; what becomes of h, codes; rows. The inputs also as the GEMMs take them."""

    x: torch.Tensor
    h: torch.Tensor
    codes: torch.Tensor
    rows: torch.Tensor
    x_desc: TensorDescriptor
    codes_desc: TensorDescriptor


@kept_in_workspace
def _prefill_memory(num_rows: int, hidden: int, intermediate: int, config: PrefillConfig, device: torch.device) -> PrefillMemory:
    dtype = torch.float8_e4m3fn if config.fp8 else torch.bfloat16
    h = scratch((num_rows, padded_size(intermediate)), torch.bfloat16, device)
    rows = scratch((num_rows, hidden), torch.bfloat16, device)
    x = _in_memory_of(rows, padded_size(hidden), dtype)
    codes = scratch(tuple(h.shape), dtype, device) if config.fp8 else h
    return PrefillMemory(x, h, codes, rows, _operand(x, config), _operand(codes, config))


def _operand(x: torch.Tensor, config: PrefillConfig) -> TensorDescriptor:
    """x, bf16 or e4m3 in fragment order, as a prefill GEMM takes it."""
    return tma_descriptor(x, config.box, config.step_k)


def _in_memory_of(rows: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The input of GEMM1, in memory that GEMM2 will write to, if there is enough of it."""
    num_rows, has = rows.shape
    if dtype == rows.dtype and columns == has:
        return rows
    if columns * dtype.itemsize > has * rows.dtype.itemsize:
        return scratch((num_rows, columns), dtype, rows.device)
    return rows.view(dtype).view(-1)[: num_rows * columns].view(num_rows, columns)


def _decode_gemm(
    x: torch.Tensor, x_scale: torch.Tensor | None, activations: ActivationFormat, y: torch.Tensor, experts: HopperExperts,
    work: WorkList | torch.Tensor, expert_offset: int, *, is_w13: bool,
) -> None:  # fmt: skip
    """Multiply x, rows times `x_scale` where there is one, after rounding it to `activations`."""
    if isinstance(work, torch.Tensor):
        (num_tokens, top_k), rows, num_entries, token_of_row = work.shape, work, work, work
        num_items = num_tokens * top_k
    else:
        num_tokens, top_k, rows, num_entries, token_of_row = 1, 0, work.entries, work.num_entries, work.token_of_row
        num_items = rows.shape[0]
    kept = _decode_constants(experts, is_w13, num_tokens, top_k, x_scale is not None, x.stride(0), activations)
    if kept.encodes:
        input_scale = experts.w13_input_scale if is_w13 else experts.w2_input_scale
        x, x_scale = encode_rows(x, activations, input_scale, out=None if is_w13 else x, launch_early=True)
    tensors = DecodeTensors(x, x if x_scale is None else x_scale, *kept.weights, y, rows, num_entries, token_of_row)
    launch(
        grouped_gemm_w4a16_decode, (num_items * kept.spec.row_tiles, kept.spec.parts, 1),
        (tensors, num_tokens, expert_offset, experts.num_experts), (kept.spec,),
        num_warps=NUM_WARPS * kept.spec.slices, launch_pdl=True, maxnreg=kept.registers,
    )  # fmt: skip


def _prefill(
    hidden: Hidden, experts: HopperExperts, work: WorkList, memory: PrefillMemory, activations: ActivationFormat, config: PrefillConfig
) -> None:
    codes, scales = hidden, None
    if isinstance(hidden, torch.Tensor):
        codes, scales = encode_rows(hidden, activations, experts.w13_input_scale, launch_early=True)
    _, x_scale = gather(codes, work, memory.x.shape[1], scales, out=memory.x, launch_early=True)
    _prefill_gemm(memory.x_desc, x_scale, memory.h, experts, work, config, is_w13=True)
    _, h_scale = encode_rows(memory.h, activations, experts.w2_input_scale, in_fragment_order=True, out=memory.codes)
    _prefill_gemm(memory.codes_desc, h_scale, memory.rows, experts, work, config, is_w13=False)


def _prefill_fp8(hidden: Hidden, experts: HopperExperts, work: WorkList, memory: PrefillMemory, config: PrefillConfig) -> None:
    if isinstance(hidden, Fp8Tensor):
        _, x_scale = gather_codes(hidden, work, memory.x.shape[1], out=memory.x)
    else:
        assert isinstance(hidden, torch.Tensor), "configs.takes_fp8 lets nothing else through"
        _, x_scale = quantize_tokens(hidden, work, memory.x.shape[1], out=memory.x, launch_early=True)
    _prefill_gemm(memory.x_desc, x_scale, memory.h, experts, work, config, is_w13=True)
    _, h_scale = quantize_rows(memory.h, out=memory.codes)
    _prefill_gemm(memory.codes_desc, h_scale, memory.rows, experts, work, config, is_w13=False)


def _prefill_gemm(
    x: TensorDescriptor, x_scale: torch.Tensor | None, y: torch.Tensor, experts: HopperExperts, work: WorkList, config: PrefillConfig, *, is_w13: bool
) -> None:
    """Multiply x, bf16 or (with a `config` for it) e4m3; rows times `x_scale` where there is one."""
    kept = _prefill_constants(experts, is_w13, x_scale is not None, config)
    launch(
        grouped_gemm_prefill,
        (Target.of(y.device).num_sms, 1, 1),
        (x, *kept.weights, kept.bias if x_scale is None else x_scale, kept.bias, y, work.entries, work.num_entries),
        (kept.spec,),
        num_warps=4,
        maxnreg=config.launch_registers,
        ptx_options=PTXAS_OPTIONS,
    )


class PrefillConstants(NamedTuple):
    """What a prefill GEMM is launched with at every call of the layer. `weights`: the parameters of the kernel behind `x_desc`."""

    weights: tuple[Any, ...]
    bias: torch.Tensor
    spec: PrefillSpec


Made = TypeVar("Made")


def _kept_with_layer(make: Callable[..., Made]) -> Callable[..., Made]:
    """`make`(experts, ...), whose result is kept as long as the experts: to make it anew at every call would take the host longer than the launch."""
    kept: WeakKeyDictionary[HopperExperts, dict[Hashable, Made]] = WeakKeyDictionary()

    def find(experts: HopperExperts, *arguments: Any) -> Made:
        of_layer = kept.get(experts)
        if of_layer is None:
            of_layer = kept.setdefault(experts, {})
        found = of_layer.get(arguments)
        if found is None:
            found = of_layer[arguments] = make(experts, *arguments)
        return found

    return find


@_kept_with_layer
def _prefill_constants(experts: HopperExperts, is_w13: bool, is_scaled: bool, config: PrefillConfig) -> PrefillConstants:
    matrix = experts.w13 if is_w13 else experts.w2
    shift, multiplier, bias = _optional(matrix)
    words = tma_descriptor(matrix.words.view(-1, 32), 64 if matrix.column_tiles % 4 == 0 else 16, 32)
    scales = tma_descriptor(matrix.scales.view(torch.int32).view(-1, matrix.scales.shape[-1] // 4), 8, matrix.scales.shape[-1] // 4)
    spec = _prefill_spec(config, matrix.column_tiles, **_product(experts, is_w13, is_scaled))
    return PrefillConstants((words, scales, shift, multiplier, matrix.row_exponent), bias, spec)


class DecodeConstants(NamedTuple):
    """The same of a decode GEMM. `encodes`: x is rounded by a launch of its own."""

    encodes: bool
    registers: int
    weights: tuple[torch.Tensor, ...]
    spec: DecodeSpec


@_kept_with_layer
def _decode_constants(
    experts: HopperExperts, is_w13: bool, num_tokens: int, top_k: int, is_scaled: bool, x_stride: int, activations: ActivationFormat
) -> DecodeConstants:
    """Of the direct kernel, or, where `top_k` is 0, of that which is given a work list."""
    matrix, direct = experts.w13 if is_w13 else experts.w2, top_k > 0
    parts = _parts_of_w2(experts.intermediate) if direct and not is_w13 else 1
    shape = _direct_shape(Size(num_tokens, top_k), matrix.row_tiles, matrix.column_tiles, parts) if direct else DirectShape(1, 0)
    is_rounded = activations == "fp8" and shape.rows_in_shared > 0
    encodes = not is_rounded and activations != "bf16"
    is_scaled |= encodes and activations != "mxfp8"
    shift, multiplier, bias = _optional(matrix)
    spec = _decode_spec(
        **_product(experts, is_w13, is_scaled),
        columns=experts.hidden if is_w13 else experts.intermediate,
        x_stride=x_stride,
        direct=direct,
        top_k=max(1, top_k),
        parts=parts,
        **shape._asdict(),
        is_rounded=is_rounded,
    )
    is_wide = direct and shape.slices == 1 and (is_scaled or not is_w13)
    registers = WIDE_REGISTERS if is_wide else DECODE_REGISTERS
    return DecodeConstants(encodes, registers, (matrix.words, matrix.scales, shift, multiplier, bias), spec)


@functools.cache
def _prefill_spec(config: PrefillConfig, column_tiles: int, **product: Any) -> PrefillSpec:
    """The same object for all layers alike, which `launch` compares faster than an equal one; and for experts that torch.compile hands in anew."""
    return PrefillSpec(**product, column_tiles=column_tiles, **derived(config, product["row_tiles"], column_tiles))


_decode_spec = functools.cache(DecodeSpec)  # for the same reason


def _product(experts: HopperExperts, is_w13: bool, is_scaled: bool) -> dict[str, Any]:
    """The fields that both kinds of GEMM are compiled for."""
    matrix, (kind, alpha, beta, limit) = experts.w13 if is_w13 else experts.w2, _activation(experts)
    return {
        "row_tiles": matrix.row_tiles,
        "y_columns": padded_size(experts.intermediate) if is_w13 else experts.hidden,
        "nvfp4": experts.format == NVFP4,
        "words_for": experts.words_for,
        "scaled": is_scaled,
        "is_w13": is_w13,
        "gated": is_w13 and experts.activation.gated,
        "kind": kind,
        "alpha": alpha,
        "beta": beta,
        "limit": limit,
        "has_bias": matrix.bias is not None,
    }


def _optional(matrix: HopperMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shift, multiplier and bias; what the matrix does not have is never read and stands in as the multiplier."""
    multiplier = matrix.multiplier
    return multiplier if matrix.shift is None else matrix.shift, multiplier, multiplier if matrix.bias is None else matrix.bias


def _activation(experts: HopperExperts) -> tuple[Any, ...]:
    activation = experts.activation
    return KINDS[activation.kind], activation.alpha, activation.beta, activation.limit or 0.0
