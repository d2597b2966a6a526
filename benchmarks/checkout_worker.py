"""One checkout of halfbyte, for compare_checkouts.py: it builds layers, computes calls and times them, as it is asked to.

    PYTHONPATH=CHECKOUT/src python benchmarks/checkout_worker.py cuda        # a line of JSON in, a line of JSON out, until the input ends

All that is drawn here comes from seeds and from nothing else, so that two checkouts are given the same bytes. Of halfbyte only what every version has
is used: `prepare`, `fused_moe` and the classes that they take. A shape has the fields of compare_checkouts.Shape.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import halfbyte
from halfbyte.errors import HalfbyteError


class Call(NamedTuple):
    """hidden bf16 [T, H], ids int32 [T, k], weights fp32 [T, k]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Checkout:
    """The layer of the checkout on PYTHONPATH. Each method is a request; what it returns is the answer."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.shape: SimpleNamespace | None = None
        self.layer: Callable[[Call], torch.Tensor] | None = None
        self.calls: list[Call] = []
        self.run: Callable[[], Any] | None = None

    def describe(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
        return {"file": halfbyte.__file__, "version": halfbyte.__version__, "device": name, "torch": torch.__version__}

    def build(self, shape: dict[str, Any], format: str, activations: str) -> dict[str, Any]:
        """Make the layer, in the place of the last one. Nothing to answer."""
        self.layer = self.run = None
        self.calls = []
        self._release()
        self.shape = SimpleNamespace(**shape)
        options = {} if activations == "bf16" else {"activations": activations}
        prepared = halfbyte.prepare(random_experts(self.shape, format, self.device), **options)
        self._release()  # of the weights it was made of
        # By position: the names of these arguments are what a refactoring may change.
        self.layer = lambda call: halfbyte.fused_moe(call.hidden, prepared, call.ids, call.weights, activations=activations)
        return {}

    def draw(self, num_tokens: int) -> dict[str, Any]:
        """Draw calls, compute them, capture them, compute them again; the digests of the two."""
        assert self.layer is not None and self.shape is not None
        layer, self.run = self.layer, None
        self.calls = calls = random_calls(self.shape, num_tokens, self.device)

        def run() -> list[torch.Tensor]:
            return [layer(call) for call in calls]

        first = digest(run())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = run()
            graph.replay()
            self.run = graph.replay
        else:
            results = run()
            self.run = run
        return {"digests": [first, digest(results)]}

    def sample(self, repeats: int) -> dict[str, Any]:
        """Microseconds per call, over so many repeats of all calls after one that is not timed: the other checkout has emptied the caches."""
        run = self.run
        assert run is not None
        run()
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            us = 1e3 * start.elapsed_time(end)
        else:
            began = time.perf_counter()
            for _ in range(repeats):
                run()
            us = 1e6 * (time.perf_counter() - began)
        return {"us": us / repeats / len(self.calls), "calls": len(self.calls)}

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def random_experts(shape: SimpleNamespace, format: str, device: torch.device) -> halfbyte.ExpertWeights:
    """Experts of random bytes: all codes, block scales of 0.5 to 1.9 (NVFP4) or 2^-9 to 2^-5 (MXFP4), global scales that differ by up to 3 times."""
    nvfp4 = format == "nvfp4"
    block, (low, high) = (16, (48, 64)) if nvfp4 else (32, (118, 123))
    generator = torch.Generator(device).manual_seed(0)
    experts, hidden, intermediate = shape.num_experts, shape.hidden, shape.intermediate

    def matrix(rows: int, columns: int, *global_shape: int) -> halfbyte.QuantTensor:
        codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=device, generator=generator)
        scales = torch.randint(low, high, (experts, rows, columns // block), dtype=torch.uint8, device=device, generator=generator)
        if not nvfp4:
            return halfbyte.QuantTensor(codes, scales, None, halfbyte.MXFP4)
        global_scale = 0.006 * (0.5 + torch.rand(experts, *global_shape, device=device, generator=generator))
        return halfbyte.QuantTensor(codes, scales.view(torch.float8_e4m3fn), global_scale, halfbyte.NVFP4)

    def bias(rows: int) -> torch.Tensor:
        return (0.1 * torch.randn(experts, rows, device=device, generator=generator)).bfloat16()

    w13, w2 = matrix(2 * intermediate, hidden, 2), matrix(hidden, intermediate)
    if not shape.gpt_oss:
        return halfbyte.ExpertWeights(w13, w2)
    activation = halfbyte.Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0)
    return halfbyte.ExpertWeights(w13, w2, activation, bias(2 * intermediate), bias(hidden))


def random_calls(shape: SimpleNamespace, num_tokens: int, device: torch.device) -> list[Call]:
    """Calls with uniform routings of their own. Short ones are many: together they read more than the L2 holds, and launching them does not count."""
    generator = torch.Generator(device).manual_seed(num_tokens)

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(num_tokens, columns, device=device, generator=generator)

    def ids() -> torch.Tensor:
        scores = torch.rand(num_tokens, shape.num_experts, device=device, generator=generator)
        return scores.argsort(dim=1, stable=True)[:, : shape.top_k].int()  # topk may order equal scores either way

    count = 16 if num_tokens <= 16 else 8 if num_tokens <= 64 else 4 if num_tokens <= 256 else 2
    return [Call(normal(shape.hidden).bfloat16(), ids(), normal(shape.top_k).softmax(dim=1)) for _ in range(count)]


def digest(results: Sequence[torch.Tensor]) -> str:
    """SHA-256 of the bytes of all results.

    Raises:
        ValueError: one is not finite, or nothing but zeros: equal bits would mean nothing.
    """
    sha = hashlib.sha256()
    for result in results:
        if not result.isfinite().all() or not result.any():
            raise ValueError("a result is not finite, or nothing but zeros")
        sha.update(result.contiguous().view(torch.uint8).cpu().numpy())
    return sha.hexdigest()


def serve(device: str) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    checkout = Checkout(device)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(checkout, request.pop("do"))(**request)
            except (HalfbyteError, torch.OutOfMemoryError) as error:  # facts to report; any other error ends the comparison
                answer = {"obstacle": str(error).splitlines()[0]}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
