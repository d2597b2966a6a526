"""`warm_up`: compile the kernels of a layer before its first call, in parallel."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from halfbyte.device import current
from halfbyte.errors import HalfbyteError, InputError
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.problem import Problem, Size, layer_problem
from halfbyte.kernels.table import KernelChoice, choose
from halfbyte.moe.functional import check, check_prepared
from halfbyte.weights import PreparedExperts


def warm_up(
    experts: PreparedExperts,
    top_k: int,
    *,
    activations: ActivationFormat = "bf16",
    batch_invariant: bool = False,
    max_tokens: int = 32768,
    dtype: torch.dtype = torch.bfloat16,
    ids_dtype: torch.dtype = torch.int32,
    weights_dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compile every kernel that `fused_moe` can need for layers like `experts`, so that no later call in this process does. For servers before their
    first request, and before a CUDA graph is captured.

    `threads` compile at a time. The 29 kernels of a DeepSeek-R1 layer took 121 s with one and 75 s with two, on two busy cores, and 34 s on 16 cores
    (Triton 3.6, 2026-11-26); a fifth of the time is Python's, which threads do not share. Triton keeps the result on disk (TRITON_CACHE_DIR), from
    where another process has all 29 in 0.3 s. One layer of a kind is enough: same sizes, format, activation function and kinds of tensors. Where
    plain torch runs the layer, nothing is compiled.

    It works by calling the layer, with tokens that chose no expert; no weight is read. A workspace is allocated for every thread, of up to 512 tokens
    for the Hopper kernels and `max_tokens` for the portable one.

    Args:
        experts: any layer of the kind.
        top_k: experts per token.
        activations, batch_invariant: as the calls will have them.
        max_tokens: the most tokens in a call.
        dtype, ids_dtype, weights_dtype: of hidden, topk_ids and topk_weights; by default what `route` returns. All at addresses that are multiples of
            16, as torch allocates them: Triton compiles others apart.
        threads: by default the number of cores that this process may use.
        progress: called with (calls done, calls in all).

    Raises:
        InputError: an argument does not fit.
        UnsupportedError: no kernel applies.

    >>> w = halfbyte.ExpertWeights(*(halfbyte.quantize(torch.randn(4, n, 32), halfbyte.MXFP4) for n in (64, 32)))
    >>> halfbyte.warm_up(halfbyte.prepare(w), top_k=2)
    """
    check_prepared(experts, "warm_up")
    for name, value in (("top_k", top_k), ("max_tokens", max_tokens), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} is too small", where="warm_up", given=value, needed="at least 1")

    def tensors(num_tokens: int) -> tuple[Any, ...]:
        """The arguments of a call in which no token chose an expert."""
        hidden = torch.zeros((num_tokens, experts.hidden), dtype=dtype, device=experts.device)
        ids = torch.full((num_tokens, top_k), -1, dtype=ids_dtype, device=experts.device)
        return hidden, experts.storage, ids, torch.zeros((num_tokens, top_k), dtype=weights_dtype, device=experts.device)

    hidden, storage, ids, weights = tensors(1)
    check(hidden, storage, ids, weights, activations, None)
    problem = layer_problem("fused_moe", storage, experts.target, experts.layout, activations, hidden, batch_invariant=batch_invariant)
    kernel = choose(problem)
    calls = _calls(kernel, problem, top_k, max_tokens)
    arguments = {"activations": activations, "expert_offset": storage.first_expert, "batch_invariant": batch_invariant}

    def run(config: Hashable, numbers: list[int]) -> None:
        with current(experts.device), torch.no_grad():  # every thread has its own
            for num_tokens in numbers:
                kernel.run(*tensors(num_tokens), config=config, **arguments)

    # Triton's compiler changes the warning filters for a moment, and threads would put them back in any order.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads or _available_cores()) as pool:
        # Those for many tokens take longest to compile.
        futures = [pool.submit(run, *call) for call in reversed(calls.items())]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                # Python 3.11's parser can fail in threads (CPython issue 106905): the call below compiles what is missing then.
                if isinstance(error := future.exception(), HalfbyteError):
                    raise error
                if progress is not None:
                    progress(done, len(calls))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    # Threads that met a kernel at the same moment may have left Triton with only one thread's: the others are taken from its cache on disk. What no
    # thread could compile is compiled here, or its error raised.
    for call in calls.items():
        run(*call)
    if experts.device.type == "cuda":
        torch.cuda.synchronize(experts.device)


def _calls(kernel: KernelChoice, problem: Problem, top_k: int, max_tokens: int) -> dict[Hashable, list[int]]:
    """For each configuration that calls of up to `max_tokens` tokens take the numbers of tokens, as small as possible, that need all its variants."""
    if not kernel.configs(problem):
        return {}
    calls: dict[Hashable, list[int]] = {}
    seen: set[Hashable] = set()
    for num_tokens in range(1, max_tokens + 1):
        config = kernel.choose_config(problem, Size(num_tokens, top_k))
        numbers = calls.setdefault(config, [])
        for variant in kernel.variants(problem, Size(num_tokens, top_k), config) - seen:
            seen.add(variant)
            numbers.append(next(n for n in range(1, num_tokens + 1) if variant in kernel.variants(problem, Size(n, top_k), config)))
    return {config: sorted(set(numbers)) or [1] for config, numbers in calls.items()}


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
