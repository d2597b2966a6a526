"""`halfbyte serve`: an OpenAI-compatible server of a model."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from typing import TYPE_CHECKING

from halfbyte.cli.engine_options import add_engine_options
from halfbyte.demo import QUESTION

if TYPE_CHECKING:
    from halfbyte.serve import Launch

EXAMPLE = "halfbyte serve demo --port 8080"
_LOOPBACK = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import port
    from halfbyte.formats.activation_formats import ACTIVATION_FORMATS

    add_engine_options(parser, "halfbyte serve [options] MODEL")
    parser.add_argument("model", metavar="MODEL", help="a directory, a Hub name org/name, or demo (the embedded model)")
    engines = ("auto", "vllm", "sglang", "transformers")
    parser.add_argument("--engine", choices=engines, default="auto", help="what serves it; auto: the first of the others that is installed")
    parser.add_argument("--host", default=_LOOPBACK, help="address to listen on; 0.0.0.0 opens it to the network, without any password")
    parser.add_argument("--port", type=port, default=8000, help="port to listen on; 0 takes a free one")
    name = "the model's name in requests and answers (default: MODEL)"
    parser.add_argument("--served-model-name", "--served-name", dest="served_name", metavar="NAME", help=name)
    parser.add_argument("--activations", choices=ACTIVATION_FORMATS, default="bf16", help="what packed experts compute on")
    parser.add_argument("--json", action="store_true", help="say that it is ready with one JSON document")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM comes, which is success, or SIGINT.

    Raises:
        KeyboardInterrupt: SIGINT came; the engine has ended.
        CheckpointError: no such model.
        InputError: a port that is taken, options that contradict each other.
        UnsupportedError: the engine is not installed.
        HalfbyteError: the engine ended.
    """
    from halfbyte.serve import Launch, Server, choose_engine, model_argument, reserve_port

    engine = choose_engine(args.engine)
    reserved = reserve_port(args.host, args.port)
    launch = Launch(
        model=model_argument(args.model),
        served=args.served_name or args.model,
        host=args.host,
        port=reserved.getsockname()[1],
        activations=args.activations,
        options=args.engine_options,
    )
    command = engine.command(launch)
    print(f"halfbyte: starting {engine.name} {engine.version}: {shlex.join(command)}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what a supervisor sends
    server = Server(command, launch)
    try:
        server.wait_until_ready()
        reserved.close()
        print(_ready(launch, engine.name, args.json), flush=True)
        server.wait()
    except (KeyboardInterrupt, SystemExit):
        print("halfbyte: stopping", file=sys.stderr, flush=True)
        raise
    finally:
        server.stop()
    return 0


def _ready(launch: Launch, engine: str, as_json: bool) -> str:
    if as_json:
        return json.dumps({"url": launch.url, "model": launch.served, "engine": engine})
    request = json.dumps({"model": launch.served, "prompt": f"Q: {QUESTION}\nA:", "max_tokens": 32})
    example = f"curl {launch.url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(request)}"
    return f"halfbyte: {launch.served} is ready at {launch.url}, until Ctrl-C. Try:\n{example}"
