"""`halfbyte quantize`: a checkpoint to NVFP4 or MXFP4."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys

from halfbyte.cli.parser import path
from halfbyte.errors import InputError

EXAMPLE = "halfbyte quantize Qwen/Qwen3-30B-A3B Qwen3-30B-A3B-NVFP4 --format nvfp4 --device cuda"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import add_threads

    parser.add_argument("source", metavar="SRC", help="model directory or Hub name org/name: bf16, fp16, fp32 or fp8-block weights")
    parser.add_argument("destination", metavar="DST", type=path, help="new directory; repeat a command that was interrupted to continue it")
    parser.add_argument("--format", choices=("nvfp4", "mxfp4"), default="nvfp4", help="of the quantised weights")
    parser.add_argument(
        "--output",
        choices=("modelopt", "compressed-tensors"),
        help="file conventions; default: modelopt for nvfp4 (vLLM, SGLang, TensorRT-LLM), compressed-tensors for mxfp4",
    )
    parser.add_argument("--four-over-six", action="store_true", help="nvfp4: choose each block's scale by squared error; smaller error, slower")
    parser.add_argument("--scale-rule", choices=("ceil", "floor", "even"), default="ceil", help="mxfp4: rounding of the block scales")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--experts-only", action="store_true", help="quantise the routed experts and nothing else (the default)")
    scope.add_argument("--all-linear", action="store_true", help="also attention, shared experts and dense layers; never router, embeddings, lm_head")
    parser.add_argument("--skip", action="append", default=[], metavar="GLOB", help="leave these modules alone: 'model.layers.0.*'; repeatable")
    parser.add_argument(
        "--calibrate",
        type=path,
        metavar="FILE",
        help="run the model on this text or JSONL and write input scales, for engines that quantise activations",
    )
    parser.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="of an output file: 5GB, 500MB")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda")
    parser.add_argument("--restart", action="store_true", help="throw away an unfinished result in DST first, whatever job it was")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written")
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Quantise and print the report.

    Raises:
        CheckpointError, UnsupportedError, InputError: as `quantize_model`; a device that is not there, before anything is written.
    """
    from halfbyte.cli.documents import print_document
    from halfbyte.cli.progress import Bar
    from halfbyte.cli.terminal import quieten_transformers, set_threads, usable_device
    from halfbyte.convert import QuantizeOptions, quantize_model

    set_threads(args.threads)
    try:
        options = QuantizeOptions(
            format=args.format,
            output=args.output,
            four_over_six=args.four_over_six,
            scale_rule=args.scale_rule,
            all_linear=args.all_linear,
            skip=tuple(args.skip),
            calibrate=args.calibrate,
            max_shard_bytes=args.max_shard_size,
            device=str(usable_device(args.device)),
        )
    except InputError as error:  # options that contradict each other: wrong usage, as argparse reports it
        print(f"halfbyte quantize: error: {error}", file=sys.stderr)
        return 2
    if args.calibrate:
        with contextlib.suppress(ImportError):  # calibration itself says what to install
            quieten_transformers()
    with Bar("calibrate", unit="tokens") as calibrating, Bar("quantize", unit="B") as bar:
        report = quantize_model(
            args.source,
            args.destination,
            options,
            restart=args.restart,
            dry_run=args.dry_run,
            progress=bar.reach,
            calibrating=calibrating.reach,
        )
    if args.json:
        print_document(report.as_dict())
    else:
        print(report)
    return 0


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MiB" or a plain number.

    >>> parse_size("5GB"), parse_size("1.5MiB"), parse_size("4096")
    (5000000000, 1572864, 4096)
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2].upper()])) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB, 500MB or 4096")
    return size
