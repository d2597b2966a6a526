"""The `halfbyte` command: finds the command's module, lets it add its arguments, runs it, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import halfbyte
from halfbyte.cli import engine_options
from halfbyte.cli.interrupts import INTERRUPTED, ending_at_once
from halfbyte.cli.parser import Parser
from halfbyte.errors import HalfbyteError, is_of_the_machine, is_out_of_memory, reason_of

# Each is a module of this package. What it does is said here, so that the list of commands prints without importing torch.
COMMANDS = {
    "demo": "quantise the embedded model, measure it against bf16 and solve word problems, on a CPU",
    "quantize": "quantise a Mixture-of-Experts checkpoint to NVFP4 or MXFP4",
    "prepare": "arrange a model's experts for this machine's kernels once, so that later starts only read them",
    "inspect": "show format, sizes, scale statistics and problems of a checkpoint",
    "generate": "continue a prompt with a model, streaming to the terminal",
    "serve": "serve a model with an OpenAI-compatible API, through vLLM, SGLang or transformers",
    "eval": "measure exact match, answer likelihood, perplexity and KL divergence of a model",
    "tune": "find the fastest configuration of a layer's kernels on this GPU, and keep it for later runs",
    "bench": "measure speed against the floor that this machine allows",
    "doctor": "describe this machine and say which kernels it can run, and why not the others",
}
BROKEN_PIPE = 141  # 128 + SIGPIPE
_EXIT_CODES = """exit codes:
  0 done, 1 failed, 2 wrong usage, 3 not supported on this machine, 130 interrupted, 141 the reader of the output went away"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv) and return its exit code.

    0 is success, 1 failure, 2 wrong usage (argparse exits by itself), 3 not supported here, 130 interrupted, 141 a broken pipe.

    >>> from halfbyte.cli.main import main
    >>> main([]) # doctest: +ELLIPSIS
    usage: halfbyte ...
    0
    """
    try:
        _open_what_is_closed()
        _let_any_letter_be_printed()
        parser = _top_parser()
        args = parser.parse_args(argv)
        if args.command is None:
            print(parser.format_help(), end="")  # print_help would swallow a broken pipe
            code = 0
        else:
            code = _run(parser, args.command, args.arguments)
        sys.stdout.flush()  # a reader that went away shows here, not in the interpreter's shutdown
        return code
    except HalfbyteError as error:
        print(f"halfbyte: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nhalfbyte: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the shutdown flushes into the broken pipe again
        return BROKEN_PIPE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = reason_of(error).rpartition("DefaultCPUAllocator: ")[2]
        print(f"halfbyte: error: {HalfbyteError(f'out of memory: {reason}', next_step='ask for less at a time')}", file=sys.stderr)
        return HalfbyteError.exit_code
    except OSError as error:
        if error.filename is None and not is_of_the_machine(error):
            raise  # nothing that a user could mend
        print(f"halfbyte: error: {HalfbyteError(error.strerror or type(error).__name__, where=str(error.filename or ''))}", file=sys.stderr)
        return HalfbyteError.exit_code


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="halfbyte",
        usage="halfbyte [--version] COMMAND ...",
        description="Run FP4 (NVFP4, MXFP4) Mixture-of-Experts models.",
        epilog=f"commands:\n{table}\n\n`halfbyte COMMAND --help` describes one command.\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"halfbyte {halfbyte.__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _run(parser: argparse.ArgumentParser, name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(COMMANDS)}"
        parser.error(f"unknown command {name!r}; {meant}")
    _let_threads_sleep()
    _import_what_swallows_interrupts()
    module = importlib.import_module(f"halfbyte.cli.{name}")
    command_parser = Parser(prog=f"halfbyte {name}", description=COMMANDS[name], example=module.EXAMPLE)
    module.add_arguments(command_parser)
    args = engine_options.parse(command_parser, arguments)
    try:
        return module.run(args)
    except argparse.ArgumentError as error:  # arguments that contradict each other, each being right alone
        command_parser.error(str(error))


def _open_what_is_closed() -> None:
    """Give what a shell has closed (`>&-`) to the null device: there is nothing to flush otherwise, and the next file that opens gets its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115  # for as long as the process lives


def _let_any_letter_be_printed() -> None:
    """Write letters out that the encoding of a stream does not have, as in the locale C: a name with one must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _import_what_swallows_interrupts() -> None:
    """Import numpy and torch, which commands compute with. Meanwhile Ctrl-C ends the process at once.

    What an interrupted import of numpy raises is caught by torch. The command then went on, or failed at the next import.
    """
    with ending_at_once():
        for name in ("numpy", "torch"):
            with contextlib.suppress(ImportError, OSError):  # a command that needs it will say so, and `doctor` what else there is
                importlib.import_module(name)


def _let_threads_sleep() -> None:
    """Make the threads of OpenMP sleep while they wait; by default they spin, which starves the others on a busy machine.

    With three busy processes per core beside it, the demo took 204 s on two cores (102 s of CPU); spinning, it was not done after 280 s (199 s of
    CPU). OpenMP reads the variable when torch is loaded, so a command sets it before. What the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
