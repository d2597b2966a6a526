"""Compile the Hopper kernels for sm_90 without a GPU: tensor-core instruction, registers, spills; and what `choose_config` picks."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compile_only import Compiled, compiling
from slow import slow_case
from stage_order import early_arrivals

import halfbyte as hb
from halfbyte.errors import UnsupportedError
from halfbyte.experts import GPT_OSS_SWIGLU, SWIGLU
from halfbyte.weights.hopper.layout import HopperExperts, HopperMatrix, WordsFor

pytest.importorskip("triton")

from halfbyte.kernels.problem import Problem, Size
from halfbyte.kernels.sm90 import configs, expert_rows, fused_moe
from halfbyte.kernels.sm90.gather import gather
from halfbyte.kernels.sm90.quantize_rows import gather_codes, quantize_rows, quantize_tokens
from halfbyte.kernels.work_list import WorkList

PREFILL = {
    "micro": configs.MICRO,
    "tiny": configs.TINY,
    "small": configs.SMALL,
    "medium": configs.MEDIUM,
    "large": configs.LARGE,
    "huge": configs.HUGE,
}


def empty_matrix(rows: int, columns: int, *, nvfp4: bool, bias: bool) -> HopperMatrix:
    """A matrix of the right sizes without memory behind it: only dtypes and sizes reach the compiler."""
    tiles = (-(-rows // 64), -(-columns // 64))
    return HopperMatrix(
        torch.empty((1, *tiles, 512), dtype=torch.int32, device="meta"),
        torch.empty((1, tiles[0], -(-tiles[1] // 4), 128 if nvfp4 else 64), dtype=torch.int64, device="meta"),
        None if nvfp4 else torch.empty(1, dtype=torch.int32),
        torch.empty((1, 2)),
        torch.empty((1, rows), dtype=torch.int8),
        torch.empty((1, rows)) if bias else None,
    )


def empty_experts(*, nvfp4: bool, words_for: WordsFor = "bf16") -> HopperExperts:
    """DeepSeek-R1 in NVFP4, or gpt-oss in MXFP4 with biases and odd sizes."""
    hidden, intermediate, activation = (7168, 2048, SWIGLU) if nvfp4 else (2880, 2880, GPT_OSS_SWIGLU)
    w13 = empty_matrix(2 * intermediate, hidden, nvfp4=nvfp4, bias=not nvfp4)
    w2 = empty_matrix(hidden, intermediate, nvfp4=nvfp4, bias=not nvfp4)
    return HopperExperts(w13, w2, hb.NVFP4 if nvfp4 else hb.MXFP4, activation, hidden, intermediate, 0, 1, words_for)


WORK = WorkList(*(torch.empty(size, dtype=torch.int32) for size in ((32,), (32,), (4, 4), (1,))))


def decode_kernels(experts: HopperExperts, work: WorkList | torch.Tensor, activations: str, *, scaled: bool = False) -> list[Compiled]:
    """The decode kernels of both products; `scaled`: hidden states bring a scale per row."""
    direct = isinstance(work, torch.Tensor)
    num_tokens, rows = work.shape[0] if direct else 4, work.numel() if direct else 32
    parts = expert_rows._parts_of_w2(experts.intermediate) if direct else 1
    h = torch.empty((rows, experts.intermediate), dtype=torch.bfloat16)
    y = torch.empty((parts * rows, experts.hidden), dtype=torch.float32 if direct else torch.bfloat16)
    with compiling(90) as compiled:
        x, scales = torch.empty((num_tokens, experts.hidden), dtype=torch.bfloat16), torch.empty(num_tokens) if scaled else None
        expert_rows._decode_gemm(x, scales, "bf16" if scaled else activations, h, experts, work, 0, is_w13=True)
        expert_rows._decode_gemm(h, None, activations, y, experts, work, 0, is_w13=False)
    kernels = [kernel for kernel in compiled if kernel.name == "grouped_gemm_w4a16_decode"]
    assert len(kernels) == 2
    for kernel in kernels:
        assert "mma.sync.aligned.m16n8k16" in kernel.ptx
        assert kernel.registers <= 72
        assert kernel.spill_bytes <= 16  # values that are needed again after the loop
    return kernels


@pytest.mark.parametrize(("nvfp4", "scaled", "words_for"), [(True, False, "bf16"), (False, True, "bf16"), (True, True, "fp8")])
def test_decode_kernels_of_a_work_list(nvfp4: bool, scaled: bool, words_for: WordsFor) -> None:
    for kernel in decode_kernels(empty_experts(nvfp4=nvfp4, words_for=words_for), WORK, "bf16", scaled=scaled):
        assert kernel.num_warps == 4 and kernel.shared_bytes == 0


@pytest.mark.parametrize(
    ("num_tokens", "nvfp4", "activations", "words_for", "shapes"),
    [
        (1, True, "bf16", "bf16", ((2, 1), (1, 1))),
        slow_case(1, True, "fp8", "fp8", ((2, 1), (1, 1))),
        slow_case(1, False, "fp8", "fp8", ((2, 1), (1, 1))),
        slow_case(3, False, "bf16", "fp8", ((1, 4), (1, 4))),
        slow_case(4, False, "fp8", "fp8", ((1, 4), (1, 4))),
        slow_case(4, True, "fp8", "bf16", ((1, 0), (1, 4))),  # four rows of 7,168 columns are too many
        slow_case(8, True, "mxfp8", "bf16", ((1, 0), (1, 0))),
    ],
)
def test_direct_kernels(num_tokens: int, nvfp4: bool, activations: str, words_for: WordsFor, shapes: tuple[tuple[int, int], ...]) -> None:
    """DeepSeek-R1 in NVFP4, gpt-oss in MXFP4, whose w2 is in parts."""
    work = torch.zeros((num_tokens, 8 if nvfp4 else 4), dtype=torch.int32)
    kernels = decode_kernels(empty_experts(nvfp4=nvfp4, words_for=words_for), work, activations)
    for kernel, (slices, rows) in zip(kernels, shapes, strict=True):
        assert kernel.num_warps == 4 * slices
        assert ("cvt.rn.satfinite.e4m3x2.f32" in kernel.ptx) == (activations == "fp8" and rows > 0)
        # Eight programs of four warps, or four of eight, have room in the 227 KiB of a multiprocessor, with the 1 KiB of each that CUDA takes.
        assert kernel.shared_bytes <= (227 // (8 // slices) - 1) * 1024
        assert (kernel.shared_bytes > 1024) == (rows > 0 or slices > 1)


def test_shapes_of_the_direct_kernel() -> None:
    """One token of Qwen3-30B, Qwen3-235B, DeepSeek-R1 and gpt-oss, and more of Qwen3-30B: slices and rows in shared memory, of w13 and w2."""

    def shapes(hidden: int, intermediate: int, num_tokens: int, top_k: int = 8) -> tuple[tuple[int, int], tuple[int, int]]:
        problem = Problem("fused_moe", hb.Target.of("cpu"), hb.NVFP4, "hopper", num_experts=128, hidden=hidden, intermediate=intermediate)
        return expert_rows.direct_shapes(problem, Size(num_tokens, top_k))

    assert shapes(2048, 768, 1) == shapes(4096, 1536, 1) == ((2, 1), (2, 1))
    assert shapes(7168, 2048, 1) == shapes(2880, 2880, 1, 4) == ((2, 1), (1, 1))
    assert [shapes(2048, 768, tokens) for tokens in (2, 3, 4, 8)] == [((2, 2), (2, 2)), ((1, 4), (1, 4)), ((1, 4), (1, 4)), ((1, 0), (1, 8))]


# Register budgets of 240, 160 and 112 for two to four consumers leave a few values in local memory, which the loop over K does not touch. A wider
# budget costs a consumer warpgroup, which costs more. The most: LARGE, two row tiles of up to 160 tokens, where the words are coded for fp8, with the
# ptxas 13.4 of Triton 3.9; with 12.8, of Triton 3.6, 64 bytes.
MAX_SPILL_BYTES = 64  # MICRO with biases; others 56
MAX_SPILL_BYTES_LARGE_FP8_WORDS = 208

# Configuration, NVFP4, w13, scaled, words, and how many sizes of a tile are compiled. A kernel has the loop over K once for each size; the largest
# has the most accumulators. Of LARGE and HUGE two together keep more in memory than one, and about as much as all.
PREFILL_KERNELS = [
    slow_case("MICRO", True, True, False, "bf16", 3),
    slow_case("MICRO", False, True, False, "bf16", 3),  # 45 tiles of columns: the last run has one
    slow_case("TINY", False, True, True, "fp8", 1),
    slow_case("SMALL", False, True, False, "bf16", 1),
    slow_case("MEDIUM", True, True, False, "bf16", 1),
    slow_case("LARGE", True, True, True, "fp8", 2),
    slow_case("HUGE", True, True, False, "bf16", 2),
    ("FP8_TINY", True, False, True, "bf16", 1),
    slow_case("FP8_WIDE", False, True, True, "fp8", 1),
    slow_case("FP8_SMALL", True, True, True, "fp8", 1),
    slow_case("FP8_MEDIUM", False, False, True, "fp8", 1),
    slow_case("FP8_LARGE", True, True, True, "bf16", 1),
    slow_case("FP8_HUGE", True, True, True, "fp8", 1),
]


def check_prefill_kernel(
    config: configs.PrefillConfig, *, nvfp4: bool, is_w13: bool, scaled: bool, words_for: WordsFor, max_spill_bytes: int = MAX_SPILL_BYTES
) -> None:
    """Tensor-core instruction, registers, spills and shared memory of one product."""
    experts = empty_experts(nvfp4=nvfp4, words_for=words_for)
    columns, rows = (experts.hidden, experts.intermediate) if is_w13 else (experts.intermediate, experts.hidden)
    dtype, instruction = (torch.float8_e4m3fn, "k32.f32.e4m3.e4m3") if config.fp8 else (torch.bfloat16, "k16")
    x, scales, y = torch.empty((64, columns), dtype=dtype), torch.empty(64) if scaled else None, torch.empty((64, rows), dtype=torch.bfloat16)
    with compiling(90) as compiled:
        expert_rows._prefill_gemm(expert_rows._operand(x, config), scales, y, experts, WORK, config, is_w13=is_w13)
    (kernel,) = compiled
    by_warpgroups = [size for pair in config.sizes for size in pair if size > config.warp_rows]
    assert all(f"wgmma.mma_async.sync.aligned.m64n{size}{instruction}" in kernel.ptx for size in by_warpgroups)
    assert ("mma.sync.aligned.m16n8k16" in kernel.ptx) == (config.warp_rows > 0)
    assert kernel.spill_bytes <= max_spill_bytes
    assert kernel.registers <= config.launch_registers
    assert kernel.shared_bytes <= 227 * 1024
    # Where ptxas lacks registers for what is in flight, it lets every wgmma wait for itself.
    assert 2 * kernel.sass.count("WARPGROUP.ARRIVE") <= kernel.sass.count("GMMA.64x")
    assert early_arrivals(kernel.sass) == []


@pytest.mark.parametrize(("name", "nvfp4", "is_w13", "scaled", "words_for", "num_sizes"), PREFILL_KERNELS)
def test_prefill_kernels_use_wgmma_within_their_registers(
    name: str, nvfp4: bool, is_w13: bool, scaled: bool, words_for: WordsFor, num_sizes: int
) -> None:
    config = getattr(configs, name)
    limit = MAX_SPILL_BYTES_LARGE_FP8_WORDS if (name, words_for) == ("LARGE", "fp8") else MAX_SPILL_BYTES
    config = replace(config, sizes=config.sizes[-num_sizes:])
    check_prefill_kernel(config, nvfp4=nvfp4, is_w13=is_w13, scaled=scaled, words_for=words_for, max_spill_bytes=limit)


def test_quantising_kernels_compile() -> None:
    x = torch.empty((4, 7168), dtype=torch.bfloat16)
    with compiling(90) as compiled:
        quantize_tokens(x, WORK, 7168, launch_early=True)
        quantize_rows(x)
        gather_codes(hb.quantize_fp8(torch.zeros((4, 7168))), WORK, 7168)
    assert len(compiled) == 3 and all(kernel.spill_bytes == 0 for kernel in compiled)
    assert ["cvt.rn.satfinite.e4m3x2.f32" in kernel.ptx for kernel in compiled] == [True, True, False]


def test_gathers_compile() -> None:
    x = torch.zeros((4, 7168), dtype=torch.bfloat16)
    coded = (hb.quantize(x, hb.NVFP4, torch.ones(4)), hb.quantize(x, hb.MXFP4), hb.quantize_fp8(x), hb.quantize_fp8(x, "mx"))
    with compiling(90) as compiled:
        for hidden in (x, *coded):
            gather(hidden, WORK, 7168, launch_early=True)
    assert len(compiled) == 5 and all(kernel.spill_bytes == 0 and kernel.registers <= 64 for kernel in compiled)


@pytest.mark.parametrize("in_registers", [True, False])
@pytest.mark.parametrize("fp8", [True, False])
def test_the_benchmark_of_the_instruction_compiles(fp8: bool, in_registers: bool) -> None:
    spec = importlib.util.spec_from_file_location("wgmma", Path(__file__).parents[3] / "benchmarks/wgmma.py")
    wgmma = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wgmma)
    with compiling(90) as compiled:
        wgmma.multiply[(1,)](torch.empty(1), 10, 32, 4, fp8, in_registers, 4, True, num_warps=16, enable_fp_fusion=True)
    assert compiled[0].ptx.count("wgmma.mma_async") == (8 if fp8 else 16) and compiled[0].spill_bytes == 0


def choose(
    num_tokens: int, top_k: int, num_experts: int, activations: str = "bf16", format: hb.BlockFormat = hb.NVFP4, layout: str = "hopper", *,
    sizes: tuple[int, int] = (2048, 768), **others: object,
) -> configs.Config:  # fmt: skip
    problem = Problem(
        "fused_moe", hb.Target.of("cpu"), format, layout, activations, num_experts=num_experts, hidden=sizes[0], intermediate=sizes[1], **others
    )
    return configs.choose_config(problem, Size(num_tokens, top_k))


def test_the_choice_follows_the_rows_an_expert_has() -> None:
    names = {id(config): name for name, config in PREFILL.items()}
    chosen = [choose(num_tokens, 8, 128) for num_tokens in (1, 8, 9, 64, 128, 256, 512, 1024, 2048, 4096)]
    assert [names.get(id(config), "decode") for config in chosen] == [
        "decode", "decode", "decode", "decode", "tiny", "tiny", "small", "medium", "large", "huge",
    ]  # fmt: skip
    assert chosen[0] == chosen[1] == configs.DIRECT and chosen[2] == configs.DECODE
    assert choose(8, 9, 128) == configs.DECODE  # 72 slots
    large = [choose(num_tokens, 8, 256, sizes=(7168, 2048)) for num_tokens in (9, 80, 81, 272, 273, 512)]
    assert [names.get(id(config), "decode") for config in large] == ["decode", "decode", "micro", "micro", "tiny", "tiny"]
    fp8 = [choose(num_tokens, 8, 128, "fp8") for num_tokens in (1, 384, 512, 1024, 1536, 2048, 4096)]
    assert fp8[:2] == [choose(num_tokens, 8, 128) for num_tokens in (1, 384)]
    assert fp8[2:] == [configs.FP8_WIDE, configs.FP8_SMALL, configs.FP8_MEDIUM, configs.FP8_LARGE, configs.FP8_HUGE]
    assert [choose(num_tokens, 8, 128, "fp8", hb.MXFP4) for num_tokens in (192, 193, 257, 609)] == [
        configs.TINY, configs.FP8_TINY, configs.FP8_WIDE, configs.FP8_SMALL,
    ]  # fmt: skip
    assert [choose(num_tokens, 8, 128, "fp8", layout="hopper_fp8") for num_tokens in (8, 10, 11, 609)] == [
        configs.DIRECT, configs.DECODE, configs.FP8_TINY, configs.FP8_SMALL,
    ]  # fmt: skip
    few = [choose(num_tokens, 2, 8, "fp8", layout="hopper_fp8") for num_tokens in (64, 65)]
    assert few == [configs.FP8_TINY, configs.FP8_SMALL]  # with 8 experts a hot one would have many tiles of FP8_WIDE
    large = [choose(num_tokens, 8, 256, "fp8", hb.MXFP4, "hopper_fp8", sizes=(7168, 2048)) for num_tokens in (1, 2)]  # 352 and 705 million weights
    assert large == [configs.DIRECT, configs.FP8_TINY]
    middle = [choose(num_tokens, 8, 128, "fp8", layout="hopper_fp8", sizes=(4096, 1536)) for num_tokens in (3, 4)]  # 453 and 604 million
    assert middle == [configs.DIRECT, configs.FP8_TINY]
    assert [choose(num_tokens, 1, 1, "fp8", layout="hopper_fp8") for num_tokens in (4, 5)] == [configs.DIRECT, configs.FP8_TINY]


def test_hidden_states_in_another_format_than_fp8_do_not_go_to_its_tensor_cores() -> None:
    assert choose(4096, 8, 128, "fp8", quantized="fp8") == configs.FP8_HUGE
    assert choose(4096, 8, 128, "fp8", quantized="nvfp4") == choose(4096, 8, 128, "fp8", quantized="mxfp8") == configs.HUGE


def test_weights_are_rounded_where_fp8_tensor_cores_multiply() -> None:
    def rounds(num_tokens: int, activations: str, layout: str = "hopper") -> bool:
        problem = Problem("fused_moe", hb.Target.of("cpu"), hb.NVFP4, layout, activations, num_experts=1, hidden=7168, intermediate=2048)
        return configs.rounds_weights(configs.choose_config(problem, Size(num_tokens, 1)))

    assert not rounds(24, "fp8") and rounds(25, "fp8") and not rounds(4096, "bf16")
    assert not rounds(4, "fp8", "hopper_fp8") and rounds(5, "fp8", "hopper_fp8")


def test_gradients_are_refused_before_anything_runs() -> None:
    experts = empty_experts(nvfp4=True)
    x, ids, weights = torch.zeros((2, 7168), dtype=torch.bfloat16), torch.zeros((2, 1), dtype=torch.int32), torch.ones((2, 1))
    with pytest.raises(UnsupportedError, match="no backward pass"):
        fused_moe.run(x.requires_grad_(), experts, ids, weights)
    assert fused_moe.run(torch.zeros((0, 7168), dtype=torch.bfloat16), experts, ids[:0], weights[:0]).shape == (0, 7168)
