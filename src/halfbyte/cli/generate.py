"""`halfbyte generate`: continue one prompt."""

from __future__ import annotations

import argparse
import sys
import time

from halfbyte.demo import QUESTION

EXAMPLE = f'halfbyte generate demo-output/nvfp4 "{QUESTION}"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import add_dtype, add_threads, positive_int, temperature, utf8
    from halfbyte.formats.activation_formats import ACTIVATION_FORMATS

    parser.add_argument("model", metavar="MODEL", help="a directory, a Hub name org/name, or demo (the embedded model)")
    parser.add_argument("prompt", type=utf8, help="a question for the chat template, or with --raw the text to continue")
    parser.add_argument("--max-new-tokens", type=positive_int, metavar="N", default=256, help="longest continuation")
    parser.add_argument("--raw", action="store_true", help="give the model the prompt as it is")
    parser.add_argument("--temperature", type=temperature, metavar="T", default=0.0, help="sample at this temperature; 0 takes the likeliest token")
    parser.add_argument("--activations", choices=ACTIVATION_FORMATS, default="bf16", help="what packed experts compute on")
    parser.add_argument("--device", help="torch device (default: the GPU where there is one)")
    add_dtype(parser)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of streaming")


def run(args: argparse.Namespace) -> int:
    """Stream the continuation to stdout, and its speed to stderr.

    Raises:
        InputError: an empty prompt.
        CheckpointError, UnsupportedError: the model cannot be loaded here.
    """
    from halfbyte.arguments import dtype_name
    from halfbyte.cli.documents import print_document
    from halfbyte.cli.terminal import load_model, set_threads, usable_device
    from halfbyte.device import model_dtype
    from halfbyte.errors import InputError
    from halfbyte.eval.generation import complete, prompt_ids

    set_threads(args.threads)
    device = usable_device(args.device)
    model, tokenizer = load_model(args.model, device, args.activations, dtype=model_dtype(device, args.dtype))
    ids = tokenizer(args.prompt)["input_ids"] if args.raw else prompt_ids(tokenizer, args.prompt)
    if not args.prompt or not ids:
        raise InputError("the prompt is empty", where="halfbyte generate")
    start = time.perf_counter()
    new_ids = complete(model, tokenizer, ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature, stream=not args.json)
    seconds = time.perf_counter() - start
    dtype = dtype_name(model.dtype)
    if args.json:
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
        counted = {"new_tokens": len(new_ids), "seconds": seconds}
        print_document({"model": args.model, "dtype": dtype, "prompt": args.prompt, "text": text, **counted})
    else:
        speed = f"{len(new_ids)} tokens in {seconds:.2f} s, {len(new_ids) / seconds:.1f} tokens/s in {dtype}"
        print(f"{speed}, prompt of {len(ids)} included", file=sys.stderr)
    return 0
