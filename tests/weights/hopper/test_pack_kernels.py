"""The kernels that pack the Hopper layout: interpreted on the CPU, compiled for GPUs that are not there, and on one that is; `prepare` in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_equal_bits
from interpreted import run_interpreted_script
from random_experts import make_experts
from slow import slow_case

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.experts import RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.weights.hopper import bits, layout
from halfbyte.weights.hopper.pack import unpack

pytest.importorskip("triton")
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU of compute capability 8.0 or newer")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
BUFFER_LIMIT = 64 << 20


def copy_of(w: ExpertWeights, device: str = "cpu") -> ExpertWeights:
    return w.with_tensors({name: tensor.to(device, copy=True) for name, tensor in w.tensors.items()})


def with_bytes(w: ExpertWeights, name: str, value: int) -> ExpertWeights:
    """A copy with one scale byte of the last expert replaced."""
    changed = copy_of(w)
    changed.tensors[f"{name}.scales"].view(torch.uint8)[-1, -1, -1] = value
    return changed


def assert_same_experts(actual: layout.HopperExperts, expected: layout.HopperExperts) -> None:
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert_equal_bits(actual.tensors[name].cpu(), tensor.cpu())


def packed_on_cpu(w: ExpertWeights, layout: str = "hopper") -> layout.HopperExperts:
    return hb.prepare(copy_of(w), layout).storage


def test_interpreted_kernels_write_the_bytes_of_the_torch_code() -> None:
    run_interpreted_script(Path(__file__).with_name("interpreted_pack.py"))


@pytest.mark.parametrize(
    ("order", "block", "words_for", "capability"),
    [
        ("gate_up", 16, "bf16", 80),
        slow_case("gate_up", 32, "fp8", 90),
        slow_case("fragment", 32, "bf16", 90),
        slow_case("straight", 16, "fp8", 90),
    ],
)
def test_compiles_to_wide_loads_and_stores_without_spills(order: layout.RowOrder, block: int, words_for: layout.WordsFor, capability: int) -> None:
    from compile_only import compiling

    from halfbyte.weights.hopper import pack_kernels

    codes, scales = torch.empty((2, 4096, 3584), dtype=torch.uint8), torch.empty((2, 4096, 7168 // block), dtype=torch.uint8)
    words, scale_words = torch.empty((2, 64, 112, 512), dtype=torch.int32), torch.empty((2, 64, 28, 2048 // block), dtype=torch.int64)
    with compiling(capability) as compiled:
        pack_kernels.pack_matrix(codes, scales, words, scale_words, order, words_for, torch.zeros((), dtype=torch.uint8))
        pack_kernels.unpack_matrix(words, scale_words, codes, scales, order, words_for)
        pack_kernels.largest_of_rows(scales, 126, torch.zeros((), dtype=torch.uint8))
        pack_kernels.write_row_exponents(
            torch.empty((2, 4096), dtype=torch.uint8), torch.empty((2, 4096), dtype=torch.int8), order, nvfp4=block == 16
        )
    pack, unpack, largest_of_rows, _ = compiled
    for kernel in compiled:
        assert kernel.spill_bytes == 0 and kernel.registers <= 64
    assert largest_of_rows.sass.count("LDG.E.128") >= 2
    for kernel in (pack, unpack):
        assert kernel.sass.count("LDG.E.128") >= 4 and kernel.sass.count("STG.E.128") == 4


@pytest.mark.parametrize(
    ("order", "block", "columns", "words_for"),
    [
        slow_case("gate_up", 16, 7168, "bf16"),
        ("straight", 16, 2048, "fp8"),
        slow_case("fragment", 32, 2880, "bf16"),
        slow_case("gate_up", 32, 2880, "fp8"),
    ],
)
def test_as_many_programs_run_at_the_same_time_as_pack_in_place(order: layout.RowOrder, block: int, columns: int, words_for: layout.WordsFor) -> None:
    from compile_only import compiling

    from halfbyte.weights.hopper import pack_in_place

    codes, scales = torch.empty((2, 4096, columns // 2), dtype=torch.uint8), torch.empty((2, 4096, columns // block), dtype=torch.uint8)
    words = torch.empty((2, 64, columns // 64, 512), dtype=torch.int32)
    scale_words = torch.empty((2, 64, -(-columns // 256), 2048 // block), dtype=torch.int64)
    with compiling(90) as compiled:
        pack_in_place.pack_matrix_in_place(codes, scales, words, scale_words, order, words_for, torch.zeros((), dtype=torch.uint8), 132)
    (kernel,) = compiled
    programs = pack_in_place.PROGRAMS_OF_A_MULTIPROCESSOR
    assert kernel.spill_bytes == 0
    assert kernel.num_warps * 32 * kernel.registers * programs <= 65536
    assert (kernel.shared_bytes + 1024) * programs <= 228 << 10  # 1 KiB of each block is the system's
    assert "cp.async.bulk.tensor.2d.global.shared" in kernel.ptx and kernel.sass.count("LDG.E.128") == (12 if columns % 256 == 0 else 0)
    assert all(text in kernel.ptx for text in ("global.gpu.release.add", "acquire"))


@pytest.mark.parametrize(("activation", "unit_tiles"), [(SWIGLU, 2), (RELU2, 1)], ids=["gated", "plain"])
def test_a_unit_is_packed_from_the_memory_it_is_packed_to(activation: Activation, unit_tiles: int) -> None:
    """What packing in place rests on: row tiles n and n + T / 2 of w13 are made of the rows that lie there, without a gate each of its own."""
    rows = layout.source_rows(layout.w13_order(activation), 2 * 192 if activation.gated else 192).view(unit_tiles, 3, 64)
    for n in range(3):
        assert torch.equal(rows[:, n].flatten().sort().values // 64, torch.arange(n, 3 * unit_tiles, 3).repeat_interleave(64))


def test_scales_are_encoded_without_loss() -> None:
    e4m3 = torch.arange(0x7F, dtype=torch.uint8)
    encoded = bits.encode_nvfp4_scale(e4m3)
    value = torch.exp2((encoded >> 3).float() - 21) * (1 + (encoded & 7) / 8)
    value[0] = 0
    assert encoded[0] == 0 and torch.equal(value, e4m3.view(torch.float8_e4m3fn).float())
    assert torch.equal(bits.decode_nvfp4_scale(encoded), e4m3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["hopper", "hopper_fp8"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("activation", [SWIGLU, RELU2], ids=["gated", "plain"])
@pytest.mark.parametrize(("hidden", "intermediate", "reused"), [(256, 512, 4), (256, 64, 3), (64, 64, 2), (96, 256, 0), (64, 96, 0)])
def test_in_place(hidden: int, intermediate: int, reused: int, format: hb.BlockFormat, activation: Activation, layout: str, device: str) -> None:
    """Codes of w13 and w2 stay when H and I are multiples of 64, scales when those of their columns are multiples of 256."""
    w = make_experts(3, hidden, intermediate, format, activation)
    expected, consumed = packed_on_cpu(w, layout), copy_of(w, device)
    before = {name: tensor.data_ptr() for name, tensor in consumed.tensors.items()}
    prepared = hb.prepare(consumed, layout, in_place=True)
    assert_same_experts(prepared.storage, expected)
    assert sum(tensor.data_ptr() in before.values() for tensor in prepared.storage.tensors.values()) == reused
    for name, tensor in prepared.unprepare().tensors.items():
        assert_equal_bits(tensor.cpu(), w.tensors[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("format", "byte"), [(hb.NVFP4, 0x7F), (hb.NVFP4, 0x81), (hb.MXFP4, 0xFF)])
@pytest.mark.parametrize("name", ["w13", "w2"])
def test_bad_scales_are_refused_before_anything_is_overwritten(name: str, format: hb.BlockFormat, byte: int, device: str) -> None:
    w = with_bytes(make_experts(3, 256, 256, format), name, byte)
    given = copy_of(w, device)
    with pytest.raises(InputError, match=rf"{name} has block scales that are negative or NaN .*given 1 of"):
        hb.prepare(given, "hopper", in_place=True)
    for key, tensor in given.tensors.items():
        assert_equal_bits(tensor.cpu(), w.tensors[key])


def test_in_place_in_inference_mode() -> None:
    with torch.inference_mode():
        w = make_experts(2, 64, 64, hb.NVFP4)
        expected = packed_on_cpu(w)
        assert_same_experts(hb.prepare(w, "hopper", in_place=True).storage, expected)


def test_views_that_are_not_contiguous_are_left_alone() -> None:
    w = make_experts(2, 64, 64, hb.NVFP4)
    wide = torch.zeros((2, 128, 64), dtype=torch.uint8)
    wide[:, :, :32] = w.w13.codes
    strided = w.with_tensors({**copy_of(w).tensors, "w13.codes": wide[:, :, :32]})
    prepared = hb.prepare(strided, "hopper", in_place=True)
    assert_same_experts(prepared.storage, packed_on_cpu(w))
    assert_equal_bits(wide[:, :, :32].contiguous(), w.w13.codes)


def test_nothing_happens_in_place_on_another_device() -> None:
    w = make_experts(1, 64, 64, hb.NVFP4)
    with pytest.raises(InputError, match=r"in place on another device .*given meta"):
        hb.prepare(w, "hopper", in_place=True, device="meta")


def test_device_of_the_result() -> None:
    w = make_experts(1, 64, 64, hb.NVFP4)
    assert hb.prepare(w, "canonical", device="cpu").storage.w13.codes.data_ptr() == w.w13.codes.data_ptr()
    assert_same_experts(hb.prepare(w, "hopper", device="cpu").storage, packed_on_cpu(w))


class TestOnAGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("layout", ["hopper", "hopper_fp8"])
    @pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
    @pytest.mark.parametrize("activation", [SWIGLU, RELU2], ids=["gated", "plain"])
    @pytest.mark.parametrize(("num_experts", "hidden", "intermediate"), [(1, 64, 64), (3, 160, 96), (2, 2880, 2688), (2, 288, 1408), (5, 7168, 512)])
    def test_same_bytes_as_on_the_cpu(
        self, num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat, activation: Activation, layout: str
    ) -> None:
        w = make_experts(num_experts, hidden, intermediate, format, activation)
        w.w13.scales.view(torch.uint8)[:, ::3, 1] = 0
        expected = packed_on_cpu(w, layout)
        there = copy_of(w, "cuda")
        prepared = hb.prepare(there, layout)
        assert_same_experts(prepared.storage, expected)
        back, expected_back = prepared.unprepare(), unpack(expected)
        for name, tensor in expected_back.tensors.items():
            assert_equal_bits(back.tensors[name].cpu(), tensor)
        for name, tensor in there.tensors.items():
            assert_equal_bits(tensor.cpu(), w.tensors[name])

    def test_tensors_at_odd_addresses(self) -> None:
        w = make_experts(2, 64, 64, hb.NVFP4)
        moved = {}
        for name, tensor in w.tensors.items():
            moved[name] = tensor.cuda()
            if tensor.element_size() == 1:
                buffer = torch.zeros(tensor.numel() + 4, dtype=torch.uint8, device="cuda")
                moved[name] = buffer[4:].view(tensor.dtype).view(tensor.shape)
                moved[name].copy_(tensor)
        for in_place in (False, True):
            assert_same_experts(hb.prepare(w.with_tensors(moved), "hopper", in_place=in_place).storage, packed_on_cpu(w))

    @pytest.mark.parametrize("programs", [1, 4])
    @pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
    @pytest.mark.parametrize(("num_experts", "hidden", "intermediate"), [(40, 256, 256), (16, 1280, 768), (70, 2880, 64), (3, 8192, 1024)])
    def test_in_place_units_follow_one_another(
        self, num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat, programs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Many units side by side and few, of one piece to 64; again and again, since the programs wait for one another."""
        from halfbyte.weights.hopper import pack_in_place

        w = make_experts(num_experts, hidden, intermediate, format)
        monkeypatch.setattr(pack_in_place, "PROGRAMS_OF_A_MULTIPROCESSOR", programs)
        expected = packed_on_cpu(w)
        for _ in range(20):
            assert_same_experts(hb.prepare(copy_of(w, "cuda"), "hopper", in_place=True).storage, expected)

    def test_scales_that_are_not_contiguous_take_the_way_through_a_buffer(self) -> None:
        w = make_experts(3, 256, 256, hb.NVFP4)
        there = copy_of(w, "cuda")
        wide = torch.zeros((*there.w13.scales.shape[:2], 32), dtype=torch.uint8, device="cuda")
        wide[:, :, :16] = there.w13.scales.view(torch.uint8)
        strided = there.with_tensors({**there.tensors, "w13.scales": wide[:, :, :16].view(torch.float8_e4m3fn)})
        assert_same_experts(hb.prepare(strided, "hopper", in_place=True).storage, packed_on_cpu(w))

    @pytest.mark.parametrize("pinned", [False, True])
    def test_from_the_host(self, pinned: bool) -> None:
        w = make_experts(9, 1024, 2048, hb.MXFP4)
        source = w.with_tensors({name: tensor.pin_memory() for name, tensor in w.tensors.items()}) if pinned else copy_of(w)
        prepared = hb.prepare(source, "hopper", device="cuda")
        for tensor in source.tensors.values():
            tensor.zero_()  # the caller's again
        assert prepared.device.type == "cuda" and prepared.target.arch != "cpu"
        assert_same_experts(prepared.storage, packed_on_cpu(w))

    @pytest.mark.parametrize("source", ["cpu", "cuda", "in place"])
    def test_peak_memory(self, source: str) -> None:
        """Beside the result (and the weights, unless they become it): at most one expert and 64 MiB."""
        w = make_experts(24, 2048, 2048, hb.NVFP4)
        hb.prepare(make_experts(1, 2048, 2048, hb.NVFP4).to("cuda"), "hopper", in_place=True)  # compiles
        given = copy_of(w, "cpu" if source == "cpu" else "cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prepared = hb.prepare(given, "hopper", in_place=source == "in place", device="cuda")
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        limit = w.nbytes // w.num_experts + BUFFER_LIMIT + (0 if source == "in place" else prepared.nbytes)
        assert extra <= limit, f"{extra >> 20} MiB, allowed {limit >> 20} MiB"

    def test_the_packed_experts_run(self) -> None:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("no GPU of compute capability 9.0")
        w = make_experts(4, 256, 256, hb.NVFP4).to("cuda")
        x, weights = torch.randn(5, 256, device="cuda").bfloat16(), torch.ones(5, 2, device="cuda")
        ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]], dtype=torch.int32, device="cuda")
        expected = hb.fused_moe(x, hb.prepare(w), ids, weights)
        assert torch.equal(hb.fused_moe(x, hb.prepare(w, in_place=True), ids, weights), expected)
