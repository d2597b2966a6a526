"""Which kernel runs an op: op x format x layout x activations x Target to a function, or the reason of every candidate that does not apply."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.device import Target
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.formats import BlockFormat
from halfbyte.formats.fp8_tensor import quantize_fp8 as reference_quantize_fp8
from halfbyte.kernels.reference.fused_moe import fused_moe as reference_fused_moe
from halfbyte.kernels.reference.quantize import quantize as reference_quantize
from halfbyte.kernels.reference.quantize import quantize_experts as reference_quantize_experts
from halfbyte.kernels.reference.routing import route as reference_route

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked to do. `format`, `layout` and `activations` are None for ops without weights; format None also means dense.
    `dtype` is that of the input, where it decides."""

    op: str
    target: Target
    format: BlockFormat | None = None
    layout: str | None = None
    activations: str | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Candidate:
    """A kernel of the table: `obstacle` returns why it cannot run a problem, or None; `fallback` marks one that is correct but not fast on a GPU,
    where `instead` tells the user what runs and what would be faster. `warm_up_calls` of a compiled fused_moe: see `KernelChoice`."""

    op: str
    name: str
    function: Callable
    obstacle: Callable[[Problem], str | None]
    fallback: bool = False
    instead: str = "plain torch runs instead"
    warm_up_calls: Callable | None = None


@dataclass(frozen=True)
class KernelChoice:
    """The kernel that runs a problem, and why this one.

    `warm_up_calls`, where something is compiled on first use: (experts, top_k, max_tokens, activations, batch_invariant) to calls that compile all
    that any call can need, as [(numbers of tokens, further arguments of `function`), ...]; those of one entry share their large kernels.
    """

    function: Callable
    name: str
    reason: str
    warm_up_calls: Callable[..., list[tuple[list[int], dict[str, Any]]]] | None = None


def _reads_canonical(problem: Problem) -> str | None:
    return None if problem.layout == "canonical" else f"reads layout 'canonical', the weights are in {problem.layout!r}"


def _runs_anywhere(problem: Problem) -> None:
    return None


def _triton_obstacle(problem: Problem) -> str | None:
    """Why plain Triton kernels cannot run: they need a CUDA GPU, and redux.sync and bf16, so compute capability 8.0."""
    arch = problem.target.arch
    if problem.target.is_cpu:
        return "needs a CUDA GPU, this is a CPU"
    if int(arch.removeprefix("sm_")) < 80:
        return f"needs compute capability 8.0 or newer, this is {arch}"
    return None if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"


def _triton_route(*args: Any, **kwargs: Any) -> Any:
    from halfbyte.kernels.shared.route import route  # here, so that importing halfbyte does not import triton

    return route(*args, **kwargs)


_PORTABLE = "the portable Triton kernel runs instead; on sm_90, prepare(w, layout='hopper') is what the fast kernel needs"


def _triton_fused_moe_obstacle(problem: Problem) -> str | None:
    if problem.layout == "canonical" and problem.format is None:
        return "reads NVFP4 and MXFP4 weights, these are dense"
    if problem.activations != "bf16" and problem.dtype == torch.float32:
        return f"quantises activations of bfloat16 and float16 to {problem.activations!r}, these are float32"
    return _reads_canonical(problem) or _triton_obstacle(problem)


def _triton_fused_moe(*args: Any, **kwargs: Any) -> Any:
    from halfbyte.kernels.portable.fused_moe import fused_moe

    return fused_moe(*args, **kwargs)


def _triton_warm_up_calls(*args: Any) -> Any:
    from halfbyte.kernels.portable.fused_moe import warm_up_calls

    return warm_up_calls(*args)


def _hopper_obstacle(problem: Problem) -> str | None:
    if problem.layout not in ("hopper", "hopper_fp8"):
        return f"reads layouts 'hopper' and 'hopper_fp8', the weights are in {problem.layout!r}"
    if problem.target.arch != "sm_90":
        return f"needs compute capability 9.0, this is {problem.target.arch}"
    return _triton_obstacle(problem)


def _hopper_fused_moe(*args: Any, **kwargs: Any) -> Any:
    from halfbyte.kernels.sm90.fused_moe import fused_moe

    return fused_moe(*args, **kwargs)


def _hopper_warm_up_calls(*args: Any) -> Any:
    from halfbyte.kernels.sm90.fused_moe import warm_up_calls

    return warm_up_calls(*args)


def _triton_quantize_obstacle(problem: Problem) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {problem.dtype}"
    return _triton_obstacle(problem)


def _triton_quantize(*args: Any, **kwargs: Any) -> Any:
    from halfbyte.kernels.quantizers.fp4 import quantize

    return quantize(*args, **kwargs)


def _triton_quantize_experts(*args: Any, **kwargs: Any) -> Any:
    from halfbyte.kernels.quantizers.fp4 import quantize_experts

    return quantize_experts(*args, **kwargs)


def _triton_quantize_fp8(*args: Any, **kwargs: Any) -> Any:
    from halfbyte.kernels.quantizers.fp8 import quantize_fp8

    return quantize_fp8(*args, **kwargs)


# In order of preference: the first that has no obstacle is taken.
CANDIDATES = (
    Candidate("route", "triton", _triton_route, _triton_obstacle),
    Candidate("route", "reference", reference_route, _runs_anywhere, fallback=True),
    Candidate("fused_moe", "hopper", _hopper_fused_moe, _hopper_obstacle, warm_up_calls=_hopper_warm_up_calls),
    Candidate(
        "fused_moe", "triton", _triton_fused_moe, _triton_fused_moe_obstacle, fallback=True, instead=_PORTABLE, warm_up_calls=_triton_warm_up_calls
    ),
    Candidate("fused_moe", "reference", reference_fused_moe, _reads_canonical, fallback=True),
    Candidate("quantize", "triton", _triton_quantize, _triton_quantize_obstacle),
    Candidate("quantize", "reference", reference_quantize, _runs_anywhere, fallback=True),
    Candidate("quantize_experts", "triton", _triton_quantize_experts, _triton_quantize_obstacle),
    Candidate("quantize_experts", "reference", reference_quantize_experts, _runs_anywhere, fallback=True),
    Candidate("quantize_fp8", "triton", _triton_quantize_fp8, _triton_quantize_obstacle),
    Candidate("quantize_fp8", "reference", reference_quantize_fp8, _runs_anywhere, fallback=True),
)
OPS = tuple(dict.fromkeys(candidate.op for candidate in CANDIDATES))


def obstacles(problem: Problem) -> list[tuple[Candidate, str | None]]:
    """Every kernel of the op with the reason why it cannot run `problem`, None where it can.

    Raises:
        InputError: no such op.
    """
    if problem.op not in OPS:
        raise InputError("unknown op", where="kernel table", given=repr(problem.op), needed=" or ".join(OPS))
    return [(candidate, candidate.obstacle(problem)) for candidate in CANDIDATES if candidate.op == problem.op]


@functools.cache
def choose(problem: Problem, backend: str | None = None) -> KernelChoice:
    """Return the kernel for `problem`; `backend` names the only one allowed. Taking a fallback on a GPU is logged, once, with its reason.

    Raises:
        InputError: no kernel of this op is called `backend`.
        UnsupportedError: none applies; the message has every candidate with its reason.

    >>> choose(Problem("route", halfbyte.Target.of("cpu"))).name
    'reference'
    """
    candidates = obstacles(problem)
    if backend is not None:
        candidates = [(candidate, obstacle) for candidate, obstacle in candidates if candidate.name == backend]
        if not candidates:
            names = " or ".join(repr(candidate.name) for candidate, _ in obstacles(problem))
            raise InputError(f"no kernel of {problem.op} has this name", where="backend", given=repr(backend), needed=names)
    for candidate, obstacle in candidates:
        if obstacle is None:
            return _chosen(candidate, problem, backend)
    reasons = "; ".join(f"{candidate.name}: {obstacle}" for candidate, obstacle in candidates)
    raise UnsupportedError(f"no kernel runs {problem.op} here", where=_describe(problem), needed=f"one of [{reasons}]")


def _chosen(candidate: Candidate, problem: Problem, backend: str | None) -> KernelChoice:
    if backend is not None:
        reason = "asked for by backend="
    elif problem.target.is_cpu or not candidate.fallback:
        reason = f"first that applies on {problem.target.arch}"
    else:
        reason = f"no faster kernel of {problem.op} exists for {_describe(problem)}; {candidate.instead}"
        logger.warning("%s: %s", problem.op, reason)
    return KernelChoice(candidate.function, candidate.name, reason, candidate.warm_up_calls)


def _describe(problem: Problem) -> str:
    parts = [problem.target.arch]
    if problem.layout is not None:
        parts += [repr(problem.format) if problem.format else "dense weights", f"layout {problem.layout}", f"activations {problem.activations}"]
    elif problem.format is not None:
        parts.append(repr(problem.format))
    if problem.dtype is not None:
        parts.append(str(problem.dtype))
    return ", ".join(parts)
