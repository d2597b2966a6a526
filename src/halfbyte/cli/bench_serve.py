"""`halfbyte bench serve`: time an engine with and without halfbyte."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from halfbyte.bench.records import environment
from halfbyte.bench.serve import Options, System, bench_serve
from halfbyte.bench.serve_client import Goodput, Requests
from halfbyte.bench.serve_engines import BACKENDS, OFFLINE
from halfbyte.bench.serve_rows import Workload
from halfbyte.bench.serve_weights import GEOMETRIES
from halfbyte.cli import bench_options as shared
from halfbyte.cli.engine_options import add_engine_options
from halfbyte.cli.parser import path
from halfbyte.cli.terminal import comma_list, one_of, positive_int, seconds
from halfbyte.formats.activation_formats import ACTIVATION_FORMATS

EXAMPLE = "halfbyte bench serve --geometry qwen3-30b --engine vllm --against stock,humming --activations bf16,fp8 --out results.jsonl"

_PREFILL = "64x1024,256x1024"
_DECODE = "1x128x128,16x128x128,64x128x128,256x128x256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_options(parser, "halfbyte bench serve [options] (MODEL | --geometry NAME)")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory or a Hub name org/name")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="instead of MODEL: a model of these sizes with random weights")
    parser.add_argument("--engine", choices=OFFLINE, required=True, help="which engine")
    names = {name: name for name in ("none", "stock", *dict.fromkeys(name for backends in BACKENDS.values() for name in backends))}
    against = comma_list(one_of("system", names))
    parser.add_argument("--against", type=against, metavar="NAME,...", default="stock", help="stock: the engine alone; a backend of its own; none")
    activations = comma_list(one_of("format", {name: name for name in ACTIVATION_FORMATS}))
    parser.add_argument("--activations", type=activations, metavar="NAME,...", default="bf16", help="what halfbyte computes on, one after the other")
    parser.add_argument("--prefill", type=comma_list(_prefill), metavar="NxIN,...", default=_PREFILL, help="prompts x tokens in; none: leave out")
    parser.add_argument("--decode", type=comma_list(_decode), metavar="NxINxOUT,...", default=_DECODE, help="prompts x tokens in x tokens out; none")
    parser.add_argument("--server", type=_requests, metavar="NxINxOUT@C", help="also time N requests to the engine's server, C of them together")
    parser.add_argument("--goodput", type=_goodput, metavar="ttft:MS,tpot:MS", help="--server: what a good request takes at most")
    parser.add_argument(
        "--repeats", type=positive_int, default=2, metavar="N", help="how often each is timed, short ones up to 10 times; the best counts"
    )
    parser.add_argument("--limit-s", type=seconds, metavar="S", help="end a system after this many seconds; what it has measured stays")
    parser.add_argument("--logs", type=path, metavar="DIR", help="keep what the engines print in this directory")
    shared.add_output(parser, seed="of weights and prompts", chooses_device=False)


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when every result was right, 1 when one was refused, 3 when nothing could be timed.

    Raises:
        CheckpointError: no such model.
        UnsupportedError: the engine is not installed, or does not see halfbyte.
    """
    from halfbyte.checkpoint.source import resolve_model
    from halfbyte.serve import choose_engine

    _check(args)
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    engine = choose_engine(args.engine)
    options = Options(
        engine=engine.name,
        version=engine.version,
        model=str(resolve_model(args.model).absolute()) if args.model else "",
        geometry=args.geometry or "",
        workloads=[workload for workload in (*args.prefill, *args.decode) if workload is not None],
        requests=args.server,
        goodput=args.goodput or Goodput(),
        engine_options=args.engine_options,
        repeats=args.repeats,
        seed=args.seed,
        limit_s=args.limit_s,
        logs=args.logs,
    )
    others = [System(name) for name in args.against if name != "none"]
    systems = [*others, *(System("halfbyte", kind) for kind in args.activations)]
    about = {"benchmark": "serve", "environment": _environment(["halfbyte", *sys.argv[1:]]), "ceilings": {}}
    return shared.finish(args, about, shared.collect(args, about, bench_serve(options, systems)))


def _environment(command: Sequence[str]) -> dict[str, Any]:
    """As `records.environment`; on a GPU found out by a process of its own, for a CUDA context in this one would take memory from the engine."""
    if not torch.cuda.is_available():
        return environment(torch.device("cpu"), command)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(environment, torch.device("cuda"), command).result()


def _check(args: argparse.Namespace) -> None:
    """Raises argparse.ArgumentError when arguments contradict each other, each being right alone."""
    if (args.model is None) == (args.geometry is None):
        raise argparse.ArgumentError(None, "give either MODEL or --geometry")
    if args.geometry and args.server:
        raise argparse.ArgumentError(None, "--server needs MODEL: random weights have no files for a server to load")
    if args.goodput and not args.server:
        raise argparse.ArgumentError(None, "--goodput is of --server")
    known = ("none", "stock", *BACKENDS[args.engine])
    for name in args.against:
        if name not in known:
            raise argparse.ArgumentError(None, f"{args.engine} has no backend {name}; --against takes {', '.join(known)}")


def _sizes(text: str, needed: str, count: int) -> list[int]:
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) != count or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not {needed}")
    return sizes


def _prefill(text: str) -> Workload | None:
    if text == "none":
        return None
    num_prompts, tokens_in = _sizes(text, "prompts x tokens in, as 64x1024", 2)
    return Workload("prefill", num_prompts, tokens_in, 1)


def _decode(text: str) -> Workload | None:
    if text == "none":
        return None
    workload = Workload("decode", *_sizes(text, "prompts x tokens in x tokens out, as 16x128x128", 3))
    if workload.tokens_out < 2:
        raise argparse.ArgumentTypeError(f"{text!r} decodes nothing after the first token")
    return workload


def _requests(text: str) -> Requests:
    sizes, _, concurrency = text.partition("@")
    num_requests, tokens_in, tokens_out = _sizes(sizes, "requests x tokens in x tokens out, as 512x1024x128@64", 3)
    return Requests(num_requests, positive_int(concurrency or "1"), tokens_in, tokens_out)


def _goodput(text: str) -> Goodput:
    try:
        limits = {f"{name}_ms": float(value) for name, value in (part.split(":") for part in text.split(","))}
        return Goodput(**limits)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not limits in ms, as ttft:200,tpot:20") from error
