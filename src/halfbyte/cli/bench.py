"""`halfbyte bench`: finds the benchmark's module, lets it add its arguments, and runs it."""

from __future__ import annotations

import argparse
import importlib

from halfbyte.cli import engine_options
from halfbyte.cli.parser import Parser

EXAMPLE = "halfbyte bench moe --name qwen3-30b --tokens 1,64,4096"

# Each is a module halfbyte.cli.bench_NAME with add_arguments and run, like a command.
BENCHMARKS = {
    "dispatch": "time dispatch, combine and the expert-parallel layer over NCCL and symmetric memory; started with torchrun",
    "moe": "time the fused MoE layer and its peers, each after a correctness gate",
    "prepare": "time the arranging of weights, beside the slow ways to do it",
    "quantize": "time the quantisers of activations against the copy bandwidth, each after comparing its bits",
    "serve": "time a model in vLLM or SGLang, with halfbyte and without, after comparing its layers with fp32",
    "report": "print what `bench ... --out` collected, and plot the MoE layer's",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    described = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help=f"{described}. `halfbyte bench BENCHMARK --help` says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    module = importlib.import_module(f"halfbyte.cli.bench_{args.benchmark}")
    parser = Parser(prog=f"halfbyte bench {args.benchmark}", description=BENCHMARKS[args.benchmark], example=module.EXAMPLE)
    module.add_arguments(parser)
    try:
        return module.run(engine_options.parse(parser, args.arguments))
    except argparse.ArgumentError as error:  # arguments that contradict each other
        parser.error(str(error))
