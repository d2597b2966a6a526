"""`halfbyte bench dispatch`: time dispatch, combine and the expert-parallel layer. Started on every rank:

torchrun --nproc-per-node 2 -m halfbyte bench dispatch
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from halfbyte.bench.dispatch import SPREADS, DispatchRow, Options, bench_dispatch, costs_of
from halfbyte.bench.dispatch_peers import MinimalAsyncEP
from halfbyte.bench.records import environment
from halfbyte.bench.shapes import NAMED_SHAPES
from halfbyte.bench.together import peer_gbps
from halfbyte.cli import bench_options as shared
from halfbyte.cli.bench_moe import parse_shape
from halfbyte.cli.ranks import is_torchrun, process_group
from halfbyte.cli.terminal import comma_list, one_of, positive_int, usable_device
from halfbyte.distributed.peer_memory import Capacity
from halfbyte.errors import InputError
from halfbyte.formats.activation_formats import ACTIVATION_FORMATS
from halfbyte.moe.parallel import ExpertParallel

_GPU_TOKENS, _CPU_TOKENS = (1, 16, 128, 1024, 4096), (1, 16)
_CPU_SHAPE = "256,128,16,4"

EXAMPLE = "torchrun --nproc-per-node 2 -m halfbyte bench dispatch --layer-tokens 1024,4096"


def _names(kind: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    return comma_list(one_of(kind, {name: name for name in known}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("--shape", type=parse_shape, metavar="H,I,E,k", help="hidden, intermediate, experts, experts per token")
    layer.add_argument("--name", type=shared.named_shape, metavar="NAME", help=f"one of {', '.join(NAMED_SHAPES)}; default dsr1, on a CPU a tiny one")
    parser.add_argument("--tokens", type=comma_list(positive_int), metavar="T,...", help="tokens of the rank that has most; default 1,16,..,4096")
    parser.add_argument("--layer-tokens", type=comma_list(positive_int), metavar="T,...", default=[], help="tokens per rank of whole layers")
    parser.add_argument(
        "--spread", type=_names("spread", SPREADS), metavar="NAME,...", default="even", help=f"tokens over ranks: {', '.join(SPREADS)}"
    )
    parser.add_argument(
        "--activations", type=_names("activations", ACTIVATION_FORMATS), metavar="NAME,...", default="bf16,fp8", help="of whole layers"
    )
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument(
        "--transport", choices=("auto", "nccl", "gloo"), default="auto", help="auto: symmetric memory too, where ranks reach each other"
    )
    parser.add_argument("--peer", choices=("minimal-async-ep",), help="another system beside ours: torchtitan's MinimalAsyncEP")
    shared.add_output(parser, seed="of weights, inputs and routings")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when everything brought the right bits.

    Raises:
        InputError: not started by torchrun.
        UnsupportedError: the peer is not installed.
    """
    if not is_torchrun():
        next_step = "run: torchrun --nproc-per-node 2 -m halfbyte bench dispatch"
        raise InputError("this benchmark runs on every rank", where="bench dispatch", needed="torchrun", next_step=next_step)
    with process_group(usable_device(args.device)) as device:
        return _run(args, device)


def _run(args: argparse.Namespace, device: torch.device) -> int:
    shape = args.shape[0] if args.shape else NAMED_SHAPES[args.name or "dsr1"] if device.type == "cuda" or args.name else parse_shape(_CPU_SHAPE)[0]
    tokens = tuple(dict.fromkeys(args.tokens or (_CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS)))
    capacity = Capacity(max(*tokens, *args.layer_tokens, 1), shape.hidden, shape.top_k)
    ep = ExpertParallel(None, shape.num_experts, transport="auto", capacity=capacity if args.transport == "auto" else None)
    ceiling = None if "symmetric" not in ep.transports else peer_gbps(ep.transports["symmetric"], device)
    options = Options(
        tokens=tokens,
        layer_tokens=tuple(args.layer_tokens),
        spreads=tuple(args.spread),
        activations=tuple(args.activations),
        seed=args.seed,
        graph=not args.eager,
    )
    about = {"benchmark": "dispatch", "environment": environment(device, ["halfbyte", *sys.argv[1:]]), "ceilings": {"peer_gbps": ceiling}}
    peer = MinimalAsyncEP(shape, max(tokens), device) if args.peer else None
    rows = bench_dispatch(shape, ep, options, ceiling, peer)
    if dist.get_rank() == 0:
        records = shared.collect(args, about, rows)
        shared.say(costs_of((record.row for record in records), ep.transports))
        return shared.finish(args, about, records)
    _follow(rows)
    return 0


def _follow(rows: Iterator[DispatchRow]) -> None:
    """Take part in what rank 0 reports."""
    for _ in rows:
        pass
