"""What the FP8 combine takes where two ranks share one GPU: its instructions and its latency, without NVLink. Two GPUs: `halfbyte bench dispatch`.

    CUDA_DEVICE_MAX_CONNECTIONS=32 python benchmarks/combine_one_gpu.py [--tokens 1,16,128,1024,4096] [--programs 264]

Each rank has a block of memory, a stream and so many programs; those of both are on the GPU together. A time is that of both combines.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence

import torch

import halfbyte as hb
from halfbyte.distributed import symmetric
from halfbyte.distributed.peer_memory import Capacity, PeerMemory
from halfbyte.distributed.placement import contiguous
from halfbyte.distributed.transport import Tokens
from halfbyte.distributed.wire import Wire

HIDDEN, TOP_K, EXPERTS, RANKS, CALLS, SAMPLES = 7168, 8, 256, 2, 4, 16


class SharedGpu(symmetric.SymmetricTransport):
    """A rank with a part of the programs that a whole GPU would have."""

    _num_sms = 66


def together(streams: Sequence[torch.cuda.Stream], calls: Sequence[Callable[[], object]]) -> None:
    current = torch.cuda.current_stream()
    for stream, call in zip(streams, calls, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            call()
    for stream in streams:
        current.wait_stream(stream)


def combine_us(num_tokens: int) -> float:
    """Median time of both ranks' combines; their sums are checked.

    Raises:
        AssertionError: the sums have other bits than the definition gives.
    """
    capacity, sizes, streams = Capacity(num_tokens, HIDDEN, TOP_K), [num_tokens] * RANKS, [torch.cuda.Stream() for _ in range(RANKS)]
    blocks = [torch.zeros(capacity.offsets(RANKS)["end"], dtype=torch.uint8, device="cuda") for _ in range(RANKS)]
    memories = [PeerMemory(block, [other.data_ptr() for other in blocks], rank, capacity) for rank, block in enumerate(blocks)]
    ranks = [SharedGpu(memory, contiguous(EXPERTS, RANKS), EXPERTS) for memory in memories]
    partial = [torch.randn(RANKS * num_tokens, HIDDEN, dtype=torch.float32, device="cuda").bfloat16() for _ in range(RANKS)]
    outs = [torch.empty_like(sums[:num_tokens]) for sums in partial]
    ids = torch.zeros((num_tokens, TOP_K), dtype=torch.int32, device="cuda")
    tokens = Tokens(outs[0], ids, torch.zeros_like(ids, dtype=torch.float32))
    torch.cuda.synchronize()
    together(streams, [lambda rank=rank: rank.push(Wire("bf16", HIDDEN), tokens, sizes, None) for rank in ranks])  # tells the sizes
    calls = [lambda r=r: [ranks[r].combine(partial[r], sizes, "fp8", outs[r]) for _ in range(CALLS)] for r in range(RANKS)]
    together(streams, [lambda r=r: ranks[r].combine(partial[r], sizes, "fp8", outs[r]) for r in range(RANKS)])  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        together(streams, calls)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(SAMPLES + 1)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    received = hb.quantize_fp8(partial[1][:num_tokens]).dequantize(torch.float32)
    assert torch.equal(outs[0], (partial[0][:num_tokens].float() + received).bfloat16())
    return statistics.median(1e3 * a.elapsed_time(b) / CALLS for a, b in itertools.pairwise(events))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,128,1024,4096", help="per rank")
    parser.add_argument("--programs", type=int, default=264, help="of a rank: 264 of each fill an H200")
    arguments = parser.parse_args()
    SharedGpu._num_sms = arguments.programs // symmetric.PUSH_PROGRAMS
    print("| tokens per rank | both combines, us |\n|---|---|")
    for num_tokens in map(int, arguments.tokens.split(",")):
        print(f"| {num_tokens:,} | {combine_us(num_tokens):.1f} |", flush=True)


if __name__ == "__main__":
    main()
