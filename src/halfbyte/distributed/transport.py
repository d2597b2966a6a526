"""`Transport`: how rows get to the experts and sums back to their owners. `CollectiveTransport` does it over any torch.distributed group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.distributed as dist

from halfbyte.device import Target
from halfbyte.distributed.collectives import all_gatherv, bytes_of, exchange_rows, reduce_scatterv, side_by_side
from halfbyte.distributed.failures import backend_of, naming_the_failed
from halfbyte.distributed.wire import SUM_HEADER, Wire
from halfbyte.kernels.problem import Hidden, needs_capability
from halfbyte.kernels.quantize import quantize_fp8

CombineFormat = Literal["bf16", "fp8"]
COMBINE_FORMATS: tuple[str, ...] = get_args(CombineFormat)


class Tokens(NamedTuple):
    """Rows of tokens with what routing says of them.

    Attributes:
        hidden: [R, H].
        topk_ids: int32 [R, k], ids of the whole layer; -1 in rows that hold no token.
        topk_weights: fp32 [R, k].
    """

    hidden: Hidden
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


class Transport(Protocol):
    """Both directions of one layer. `sizes`: rows of every rank, on the host, the same on all."""

    name: str

    def why_not(self, wire: Wire, hidden: Hidden, sizes: Sequence[int]) -> str | None:
        """Why such a call cannot go this way; None where it can. All ranks say the same."""
        ...

    def dispatch(self, wire: Wire, tokens: Tokens, sizes: Sequence[int], num_tokens: torch.Tensor | None) -> Tokens:
        """The rows of all ranks, in the order of ranks. `num_tokens` int32 [1]: how many of this rank's rows hold a token; None for all."""
        ...

    def partial(self, num_rows: int, hidden: int, dtype: torch.dtype, format: CombineFormat) -> torch.Tensor | None:
        """Where the experts should write [num_rows, H], if anywhere in particular."""
        ...

    def combine(self, partial: torch.Tensor, sizes: Sequence[int], format: CombineFormat, out: torch.Tensor) -> None:
        """Of partial [sum(sizes), H] of all ranks this rank's rows, added up in fp32 in the order of ranks, to out [sizes[rank], H].

        With "fp8" the rows of other ranks travel in e4m3 with one fp32 scale each; a rank's own are not rounded.
        """
        ...


class CollectiveTransport:
    """Over `all_gatherv` and `reduce_scatterv`: any backend, any number of hosts. Every rank gets all rows."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.name = group, backend_of(group, device.type)

    def why_not(self, wire: Wire, hidden: Hidden, sizes: Sequence[int]) -> str | None:
        return None

    def dispatch(self, wire: Wire, tokens: Tokens, sizes: Sequence[int], num_tokens: torch.Tensor | None) -> Tokens:
        ids = tokens.topk_ids
        if num_tokens is not None:
            ids = torch.where(torch.arange(len(ids), dtype=torch.int64, device=ids.device).unsqueeze(1) < num_tokens, ids, -1)
        parts = [*wire.encode(tokens.hidden), ids, tokens.topk_weights]
        *rows, all_ids, all_weights = all_gatherv(parts, sizes, group=self.group)
        return Tokens(wire.decode(rows), all_ids, all_weights)

    def partial(self, num_rows: int, hidden: int, dtype: torch.dtype, format: CombineFormat) -> torch.Tensor | None:
        return None

    def combine(self, partial: torch.Tensor, sizes: Sequence[int], format: CombineFormat, out: torch.Tensor) -> None:
        if format == "bf16":
            reduce_scatterv(partial, sizes, group=self.group, out=out, deterministic=True)
            return
        rank, quantized = dist.get_rank(self.group), quantize_fp8(partial)
        headers = bytes_of(quantized.scales.reshape(-1, 1).expand(-1, SUM_HEADER // 4))
        packed = side_by_side([headers, bytes_of(quantized.codes)])
        with naming_the_failed(self.group, "combine"):
            received = exchange_rows(packed, sizes, self.group)
        first = sum(sizes[:rank])
        add_codes_in_order(received, partial[first : first + sizes[rank]], rank, out)


def add_codes_in_order(received: torch.Tensor, own: torch.Tensor, rank: int, out: torch.Tensor) -> None:
    """As `add_in_order`, of uint8 [world, rows, SUM_HEADER + H] with a scale in front of the codes of each row; `own` [rows, H] instead of rank's."""
    # The kernel reads scales as words, and e4m3 by instructions of compute capability 8.9.
    if out.is_cuda and out.shape[1] % 4 == 0 and needs_capability(Target.of(out.device), 89) is None:
        from halfbyte.distributed.sums import add_rows  # imports Triton

        add_rows(received, out, own, rank)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for other, rows in enumerate(received):
        headers, codes = rows.split((SUM_HEADER, out.shape[1]), dim=1)
        scales = headers[:, :4].contiguous().view(torch.float32)
        total += own.float() if other == rank else codes.view(torch.float8_e4m3fn).float() * scales
    out.copy_(total)
