"""Run by test_sort.py under TRITON_INTERPRET=1: sort, gather and combine against plain Python and against the reference."""

import random

import torch

import halfbyte as hb
from halfbyte.kernels.reference.sort import run as reference_sort
from halfbyte.kernels.shared.combine import combine_direct
from halfbyte.kernels.shared.combine import run as combine
from halfbyte.kernels.shared.decode_rows import decode_rows
from halfbyte.kernels.shared.sort import run as sort
from halfbyte.kernels.sm90.gather import gather
from halfbyte.weights.hopper.layout import FRAGMENT_COLUMN_BF16


def check_sort(ids: torch.Tensor, offset: int, num_experts: int, max_rows: int) -> None:
    result = sort(ids, offset, num_experts, max_rows, row_start=True)
    flat = ids.flatten().tolist()
    slots = [slot for expert in range(num_experts) for slot, name in enumerate(flat) if name - offset == expert]
    assert result.token_of_row[: len(slots)].tolist() == [slot // ids.shape[1] for slot in slots]
    row_of_slot = {slot: row for row, slot in enumerate(slots)}
    assert result.row_of_slot.tolist() == [row_of_slot.get(slot, -1) for slot in range(len(flat))]
    items = result.entries[: result.num_entries.item()].tolist()
    covered = [(expert, row) for expert, start, rows, _ in items for row in range(start, start + rows)]
    assert sorted(covered) == [(flat[slot] - offset, row) for row, slot in enumerate(slots)]  # every row once, with its expert
    largest = {expert: max(rows for other, _, rows, _ in items if other == expert) for expert, _, _, _ in items}
    quarters = [min(-(-4 * (-(-rows // 16) * 16) // max_rows), 4) for rows in largest.values()]  # in the order of the list
    assert max_rows <= 16 or quarters == sorted(quarters, reverse=True)
    expected = reference_sort(ids, offset, num_experts, max_rows)
    assert torch.equal(result.row_start, expected.row_start) and torch.equal(result.row_of_slot, expected.row_of_slot)
    assert torch.equal(result.token_of_row[: len(slots)], expected.token_of_row[: len(slots)]) and result.entries.shape == expected.entries.shape
    assert torch.equal(result.num_entries, expected.num_entries) and [item[:3] for item in items] == expected.entries[: len(items), :3].tolist()


def check_gather_and_combine() -> None:
    ids = torch.tensor([[2, 0], [-1, 2], [1, 9]], dtype=torch.int32)
    work = sort(ids, 0, 3, 16)
    assert work.row_start is None  # nobody asked for it
    hidden = torch.randn(3, 96).bfloat16()
    scales = torch.rand(3)
    gathered, gathered_scales = gather(hidden, work, 128, scales)
    assert gathered_scales is not None and torch.equal(gathered_scales[:4], scales[[0, 2, 0, 1]])
    padded = torch.nn.functional.pad(hidden, (0, 32)).view(3, 2, 64)[:, :, list(FRAGMENT_COLUMN_BF16)].reshape(3, 128)
    assert torch.equal(gathered[:4], padded[[0, 2, 0, 1]])
    row_scale = torch.tensor([0.01, 0.5, 7.0])
    for q in (
        hb.quantize(hidden, hb.NVFP4, row_scale, backend="reference"), hb.quantize(hidden, hb.NVFP4, torch.tensor(0.02), backend="reference"),
        hb.quantize(hidden, hb.MXFP4, backend="reference"), hb.quantize_fp8(hidden, backend="reference"),
        hb.quantize_fp8(hidden, "mx", backend="reference"),
    ):  # fmt: skip
        decoded, decoded_scale = decode_rows(q)
        expected, expected_scale = gather(decoded, work, 128, decoded_scale)
        got, got_scale = gather(q, work, 128)
        assert torch.equal(got[:4], expected[:4]) and not torch.equal(got[0], got[1])
        assert (got_scale is None) == (expected_scale is None) and (got_scale is None or torch.equal(got_scale[:4], expected_scale[:4]))
    y, weights = torch.randn(6, 96), torch.rand(3, 2)
    out = combine(y, work.row_of_slot, weights, torch.full((3, 96), torch.nan))
    expected = torch.stack([weights[0, 0] * y[2] + weights[0, 1] * y[0], weights[1, 1] * y[3], weights[2, 0] * y[1]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
    direct_ids = torch.tensor([[4, 4, 7]], dtype=torch.int32)  # the second 4 has its row at the first; 7 is not held
    y, weights = torch.randn(3, 96), torch.rand(1, 3)
    out = combine_direct(y, direct_ids, weights, torch.empty(1, 96), 4, 3)
    torch.testing.assert_close(out, (weights[0, 0] + weights[0, 1]) * y[:1], rtol=1e-5, atol=1e-6)
    parts = torch.randn(4, 3, 96)
    in_parts = combine_direct(parts.flatten(0, 1), direct_ids, weights, torch.empty(1, 96), 4, 3)
    assert torch.equal(in_parts, combine_direct(parts[0] + parts[1] + parts[2] + parts[3], direct_ids, weights, torch.empty(1, 96), 4, 3))


if __name__ == "__main__":
    random.seed(0)
    one_launch, three, padded = (40, 3, 7, 64), (1100, 8, 3, 64), (65, 8, 70, 8)
    for num_tokens, top_k, num_experts, max_rows in (
        (1, 1, 1, 8), (3, 2, 5, 8), (40, 3, 7, 8), one_launch, (200, 2, 4, 192), (17, 4, 33, 16), (700, 8, 3, 64), three, (300, 4, 40, 64), padded,
    ):  # fmt: skip
        ids = torch.tensor([[random.randrange(-1, num_experts + 2) for _ in range(top_k)] for _ in range(num_tokens)], dtype=torch.int32)
        check_sort(ids, 0, num_experts, max_rows)
        if (num_tokens, top_k, num_experts, max_rows) in (one_launch, three):
            check_sort(ids.long() + 10, 10, num_experts, max_rows)
            check_sort(torch.full_like(ids, num_experts - 1), 0, num_experts, max_rows)
            check_sort(torch.full_like(ids, -1), 0, num_experts, max_rows)
    check_gather_and_combine()
    print("ok")
