"""Run by test_quantize_rows.py under TRITON_INTERPRET=1: the quantising kernels against `formats.activation_formats`, bit for bit.

The interpreter (Triton 3.6 to 3.9) rounds to e4m3 wrongly, so every quotient here is an e4m3 value; rounding is tested on a GPU.
"""

import torch

from halfbyte.formats.fp8_tensor import quantize_fp8
from halfbyte.kernels.shared.sort import run as sort
from halfbyte.kernels.sm90.quantize_rows import gather_codes, quantize_rows, quantize_tokens
from halfbyte.weights.hopper.layout import FRAGMENT_COLUMN_BF16, FRAGMENT_COLUMN_FP8


def in_fragment_order(codes: torch.Tensor, padded: int, order: tuple[int, ...]) -> torch.Tensor:
    wide = torch.nn.functional.pad(codes, (0, padded - codes.shape[1]))
    return wide.unflatten(1, (-1, 64))[:, :, list(order)].flatten(1)


def check(num_tokens: int, hidden: int) -> None:
    padded = -(-hidden // 64) * 64
    codes = torch.randint(8, 0x7F, (num_tokens, hidden), dtype=torch.uint8) | torch.randint(0, 2, (num_tokens, hidden), dtype=torch.uint8) << 7
    codes[:, 3], codes[:, 5] = 0, 0xFE  # a zero, and -448: the scale is then the power of two of the row
    x = (codes.view(torch.float8_e4m3fn).float() * torch.exp2(torch.arange(num_tokens) * 9.0 - 20).unsqueeze(1)).bfloat16()
    q = quantize_fp8(x)
    codes, scales = q.codes, q.scales
    ids = torch.tensor([[token % 3, -1, (token + 1) % 3] for token in range(num_tokens)], dtype=torch.int32)
    rows = sort(ids, 0, 3, 16)
    held = rows.token_of_row[: 2 * num_tokens].long()
    expected = in_fragment_order(codes.view(torch.uint8), padded, FRAGMENT_COLUMN_FP8)
    for actual, actual_scales in (quantize_tokens(x, rows, padded), gather_codes(q, rows, padded)):
        assert torch.equal(actual.view(torch.uint8)[: len(held)], expected[held])
        assert torch.equal(actual_scales[: len(held)], scales[held, 0])

    h = in_fragment_order(x.view(torch.int16), padded, FRAGMENT_COLUMN_BF16).view(torch.bfloat16)[held].contiguous()
    h = torch.cat([h, torch.full((num_tokens, padded), torch.nan, dtype=torch.bfloat16)])
    actual, actual_scales = quantize_rows(h)
    assert torch.equal(actual.view(torch.uint8)[: len(held)], expected[held])
    assert torch.equal(actual_scales[: len(held)], scales[held, 0])


if __name__ == "__main__":
    torch.manual_seed(0)
    for num_tokens, hidden in ((1, 64), (5, 96), (7, 320), (4, 2880)):
        check(num_tokens, hidden)
    print("ok")
