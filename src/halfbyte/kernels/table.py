"""Which kernel runs an op: the first provider in order of preference that supports the problem, or the reason of each that does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from halfbyte.arguments import check_name
from halfbyte.device import Target
from halfbyte.errors import UnsupportedError
from halfbyte.kernels import tuned
from halfbyte.kernels.problem import Problem, Provider, Size, Support
from halfbyte.kernels.tuned import Table
from halfbyte.weights.layouts import is_arranged_in_place

logger = logging.getLogger(__name__)

_MAX_SIZES = 4096  # numbers of tokens whose configuration is remembered

# op -> name of a kernel (what `backend=` takes) -> its module in this package, in order of preference. A module is loaded when it is asked.
PROVIDERS: dict[str, dict[str, str]] = {
    "route": {"triton": "shared.route", "reference": "reference.routing"},
    "fused_moe": {
        "hopper": "sm90.fused_moe",
        "flashinfer": "flashinfer.fused_moe",
        "triton": "portable.fused_moe",
        "reference": "reference.fused_moe",
    },
    "sort": {"triton": "shared.sort", "reference": "reference.sort"},
    "expert_rows": {"hopper": "sm90.expert_rows", "triton": "portable.expert_rows", "reference": "reference.expert_rows"},
    "combine": {"triton": "shared.combine", "reference": "reference.combine"},
    "quantize": {"triton": "quantizers.fp4", "reference": "reference.quantize"},
    "quantize_experts": {"triton": "quantizers.fp4_experts", "reference": "reference.quantize_experts"},
    "quantize_fp8": {"triton": "quantizers.fp8", "reference": "reference.quantize_fp8"},
}


@dataclass(frozen=True)
class KernelChoice:
    """The kernel that runs a problem, and why this one; the rest as in `Provider`. `tables`: where configurations other than its rule's come from."""

    name: str
    reason: str
    run: Callable[..., Any]
    capturable: bool
    layout: Callable[[Problem], str]
    configs: Callable[[Problem], tuple[Hashable, ...]]
    choose_config: Callable[[Problem, Size], Hashable | None]
    takes: Callable[[Problem, Size, Any], bool]
    rivals: Callable[[Problem, Size, Any], tuple[Hashable, ...]]
    sources: tuple[str, ...]
    variants: Callable[[Problem, Size, Hashable | None], frozenset[Hashable]]
    workspace_nbytes: Callable[[Problem, Size, Hashable | None], int]
    rounds_weights: Callable[[Hashable | None], bool]
    tables: str = ""


def support(problem: Problem) -> dict[str, Support]:
    """What every kernel of the op says of `problem`, by name, in order of preference.

    Raises:
        InputError: no such op.
    """
    check_name("op", problem.op, PROVIDERS, "kernel table")
    return {name: _support_of(module, problem) for name, module in PROVIDERS[problem.op].items()}


@functools.cache
def choose(problem: Problem, backend: str | None = None) -> KernelChoice:
    """Return the kernel for `problem`; `backend` names the only one allowed. Taking a slow one on a GPU is logged, once, with its reason.

    Where tables know which configurations are fastest for the layer (`kernels.tuned`), `choose_config` looks there first.

    Raises:
        InputError: no kernel of this op is called `backend`.
        UnsupportedError: none applies; the message has every candidate with its reason.

    >>> choose(Problem("route", halfbyte.Target.of("cpu"))).name
    'reference'
    """
    choice = choose_untuned(problem, backend)
    found = tuned.find(choice.name, problem, choice.configs(problem), choice.sources, tuned.tables_for(problem.target))
    tables, chooser = ("", choice.choose_config) if found is None else (found.reason, found.chooser(choice.choose_config, choice.takes))
    return replace(choice, choose_config=functools.lru_cache(_MAX_SIZES)(chooser), tables=tables)


def use_tables(tables: Sequence[Table], *, alone: bool = False, shipped: bool = True) -> None:
    """Choose by these tables from now on: `tuned.take`, and what was chosen before is forgotten."""
    tuned.take(tables, alone=alone, shipped=shipped)
    choose.cache_clear()


def choose_untuned(problem: Problem, backend: str | None = None) -> KernelChoice:
    """`choose` without a look into tables."""
    candidates = support(problem)
    if backend is not None:
        check_name(f"kernel of {problem.op}", backend, candidates, "backend")
        candidates = {backend: candidates[backend]}
    for name, answer in candidates.items():
        if answer.runs:
            return _choice(name, PROVIDERS[problem.op][name], _reason(problem, answer, backend))
    reasons = "; ".join(f"{name}: {answer.reason}" for name, answer in candidates.items())
    raise UnsupportedError(f"no kernel runs {problem.op} here", where=str(problem), needed=f"one of [{reasons}]")


def wanted_layout(problem: Problem, *, in_place: bool = False) -> tuple[str, str]:
    """The layout in which weights are read fastest, and why: that of the first kernel of fused_moe that runs `problem`, its layout left open.

    `in_place` leaves out layouts that are not arranged in the memory of the weights.

    >>> wanted_layout(Problem("fused_moe", halfbyte.Target.of("cpu"), halfbyte.NVFP4, activations="bf16"))[0]
    'canonical'
    """
    for name, module in PROVIDERS["fused_moe"].items():
        if not _is_loadable(module, problem.target):
            continue
        layout = _choice(name, module, "").layout(problem)
        if in_place and not is_arranged_in_place(layout):
            continue
        if _load(module).supports(problem._replace(layout=layout)).runs:
            weights = repr(problem.format) if problem.format else "dense"
            what = f"{weights} experts with {problem.activations} activations on {problem.target.arch}"
            return layout, f"read by kernel {name!r}, the first that runs {what}"
    raise AssertionError("the reference runs everything")


def _choice(name: str, module: str, reason: str) -> KernelChoice:
    provider = _load(module)
    names = {field.name for field in fields(KernelChoice)} - {"name", "reason", "tables"}
    facts: dict[str, Any] = {fact: getattr(provider if hasattr(provider, fact) else Provider, fact) for fact in names}
    return KernelChoice(name, reason, **facts)


def _reason(problem: Problem, answer: Support, backend: str | None) -> str:
    if backend is not None:
        return "asked for by backend="
    if answer.verdict == "yes":
        return f"first that applies on {problem.target.arch}"
    reason = f"no faster kernel of {problem.op} exists for {problem}; {answer.reason}"
    logger.warning("%s: %s", problem.op, reason)
    return reason


def _support_of(module: str, problem: Problem) -> Support:
    if not _is_loadable(module, problem.target):
        return Support.no("needs a CUDA GPU, this is a CPU" if problem.target.is_cpu else "needs the package triton, which is not installed")
    return _load(module).supports(problem)


def _is_loadable(module: str, target: Target) -> bool:
    """All modules but the reference import Triton, which takes a second and is not there everywhere."""
    return module.startswith("reference.") or (not target.is_cpu and importlib.util.find_spec("triton") is not None)


@functools.cache
def _load(module: str) -> Any:
    return importlib.import_module(f"halfbyte.kernels.{module}")
