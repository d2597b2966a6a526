"""`warm_up`: compile the kernels of a layer before its first call, in parallel."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch

from halfbyte.arguments import check_integers, check_type
from halfbyte.device import current
from halfbyte.errors import HalfbyteError, InputError
from halfbyte.formats.activation_formats import ActivationFormat, check_activations
from halfbyte.kernels.problem import Problem, Size, layer_problem
from halfbyte.kernels.table import KernelChoice, choose
from halfbyte.moe.checks import check_call, check_prepared
from halfbyte.weights import PreparedExperts

WARM: set[Hashable] = set()  # the calls, of layers of one kind, whose kernels this process has


def warm_up(
    layers: PreparedExperts | torch.nn.Module | Iterable[PreparedExperts],
    top_k: int | None = None,
    *,
    activations: ActivationFormat | None = None,
    batch_invariant: bool = False,
    max_tokens: int = 32768,
    dtype: torch.dtype = torch.bfloat16,
    ids_dtype: torch.dtype = torch.int32,
    weights_dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compile every kernel that `fused_moe` can need for these layers, so that no later call in this process does. For servers before their first
    request, and before a CUDA graph is captured.

    `threads` compile at a time. The 29 kernels of a DeepSeek-R1 layer took 121 s with one and 75 s with two, on two busy cores, and 34 s on 16 cores
    (Triton 3.6, 2026-11-26); a fifth of the time is Python's, which threads do not share. Triton keeps the result on disk (TRITON_CACHE_DIR), from
    where another process has all 29 in 0.3 s. Layers of one kind (same sizes, format, activation function and kinds of tensors) share kernels, and
    what was compiled before in this process is passed over: to call it again costs next to nothing. Where plain torch runs a layer, nothing is
    compiled.

    It works by calling the layer, with tokens that chose no expert; no weight is read. A workspace is allocated for every thread, of up to 512 tokens
    for the Hopper kernels and `max_tokens` for the portable one.

    Args:
        layers: prepared experts, several of them, or a model: every submodule with PreparedExperts as an attribute is a layer.
        top_k: experts per token. By default what a submodule has as its `top_k`.
        activations, batch_invariant: as the calls will have them; by default what the experts were prepared for.
        max_tokens: the most tokens in a call.
        dtype, ids_dtype, weights_dtype: of hidden, topk_ids and topk_weights; by default what `route` returns. All at addresses that are multiples of
            16, as torch allocates them: Triton compiles others apart.
        threads: by default the number of cores that this process may use.
        progress: called with (calls done, calls in all).

    Raises:
        InputError: an argument does not fit; no `top_k` where there is none to find.
        UnsupportedError: no kernel applies.

    >>> w = halfbyte.ExpertWeights(*(halfbyte.quantize(torch.randn(4, n, 32), halfbyte.MXFP4) for n in (64, 32)))
    >>> halfbyte.warm_up(halfbyte.prepare(w), top_k=2)
    """
    given = {name: value for name, value in (("top_k", top_k), ("threads", threads)) if value is not None}
    check_integers("warm_up", 1, max_tokens=max_tokens, **given)
    if activations is not None:
        check_activations(activations, "warm_up")
    check_type("warm_up", torch.dtype, dtype=dtype, ids_dtype=ids_dtype, weights_dtype=weights_dtype)
    kinds: dict[Hashable, _Kind] = {}
    for experts, k in _layers(layers, top_k):
        asked = experts.activations if activations is None else activations
        kind = _Kind(experts, k, asked, bool(batch_invariant), (dtype, ids_dtype, weights_dtype))
        kinds.setdefault(kind.key, kind)
    jobs = [job for key, kind in kinds.items() for job in kind.jobs(key, max_tokens) if not job.keys <= WARM]

    # Triton's compiler changes the warning filters for a moment, and threads would put them back in any order.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads or _available_cores()) as pool:
        # Those for many tokens take longest to compile.
        futures = [pool.submit(job.run) for job in reversed(jobs)]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                # Python 3.11's parser can fail in threads (CPython issue 106905): the call below compiles what is missing then.
                if isinstance(error := future.exception(), HalfbyteError):
                    raise error
                if progress is not None:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    # Threads that met a kernel at the same moment may have left Triton with only one thread's: the others are taken from its cache on disk. What no
    # thread could compile is compiled here, or its error raised.
    for job in jobs:
        job.run()
        WARM.update(job.keys)
    for device in {kind.experts.device for kind in kinds.values() if jobs and kind.experts.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def _layers(layers: PreparedExperts | torch.nn.Module | Iterable[PreparedExperts], top_k: int | None) -> Iterator[tuple[PreparedExperts, int]]:
    """Every layer and its number of experts per token."""
    if isinstance(layers, torch.nn.Module):
        found = [(value, module) for module in layers.modules() for value in vars(module).values() if isinstance(value, PreparedExperts)]
        pairs: Iterable[tuple[Any, Any]] = [(experts, getattr(module, "top_k", None) if top_k is None else top_k) for experts, module in found]
    else:
        pairs = [(experts, top_k) for experts in (layers if isinstance(layers, Iterable) and not isinstance(layers, torch.Tensor) else (layers,))]
    for experts, k in pairs:
        check_prepared(experts, "warm_up")
        if k is None:
            raise InputError("experts per token are not known", where="warm_up", given="no top_k", needed="top_k=")
        yield experts, k


class _Kind(NamedTuple):
    """Layers that share their kernels, by one of them, and how they will be called."""

    experts: PreparedExperts
    top_k: int
    activations: ActivationFormat
    batch_invariant: bool
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # of hidden, ids and weights

    @property
    def key(self) -> Hashable:
        tensors = tuple((tensor.dtype, tensor.shape) for tensor in self.experts.storage.tensors.values())
        return self.experts.description, self.experts.target, str(self.experts.device), tensors, *self[1:]

    def tensors(self, num_tokens: int) -> tuple[Any, ...]:
        """The arguments of a call in which no token chose an expert."""
        hidden, ids, weights = self.dtypes
        shape, device = (num_tokens, self.top_k), self.experts.device
        x = torch.zeros((num_tokens, self.experts.hidden), dtype=hidden, device=device)
        return x, self.experts.storage, torch.full(shape, -1, dtype=ids, device=device), torch.zeros(shape, dtype=weights, device=device)

    def jobs(self, key: Hashable, max_tokens: int) -> list[_Job]:
        hidden, storage, ids, weights = self.tensors(1)
        check_call(hidden, storage, ids, weights, self.activations, where="warm_up")
        experts = self.experts
        problem = layer_problem(
            "fused_moe", experts.storage, experts.target, experts.layout, self.activations, hidden, batch_invariant=self.batch_invariant
        )
        kernel = choose(problem)
        return [_Job(self, key, kernel, config, numbers) for config, numbers in _calls(kernel, problem, self.top_k, max_tokens).items()]


class _Job(NamedTuple):
    """Calls with one configuration, which need all variants of it."""

    kind: _Kind
    kind_key: Hashable
    kernel: KernelChoice
    config: Hashable
    numbers: list[int]  # of tokens

    @property
    def keys(self) -> set[Hashable]:
        return {(self.kind_key, self.config, num_tokens) for num_tokens in self.numbers}

    def run(self) -> None:
        kind, experts = self.kind, self.kind.experts
        options = {"activations": kind.activations, "expert_offset": experts.storage.first_expert, "batch_invariant": kind.batch_invariant}
        with current(experts.device), torch.no_grad():  # every thread has its own
            for num_tokens in self.numbers:
                self.kernel.run(*kind.tensors(num_tokens), config=self.config, **options)


@functools.cache  # it looks at every number of tokens
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
