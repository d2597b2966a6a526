"""What is asked of a kernel (`Problem`, `Size`), what it answers (`Support`), and what a kernel has to offer (`Provider`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch

from halfbyte.device import Target
from halfbyte.errors import InputError
from halfbyte.experts import ActivationKind
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.formats.fp8_tensor import Fp8Tensor

Hidden: TypeAlias = torch.Tensor | QuantTensor | Fp8Tensor  # hidden states: floats, or what a dispatch or a fused norm has quantised


class Problem(NamedTuple):
    """One op on one device, without the number of tokens. What an op has no use for stays at its default.

    Attributes:
        op: a key of `table.PROVIDERS`.
        target: the device.
        format: of weights, or what a quantiser writes; None for dense weights and for ops without.
        layout: of weights (`weights.layouts`), or of the scales that a quantiser writes.
        activations: what the matrix products see of their inputs.
        dtype: of the input.
        quantized: the format in which the input arrives, where it is not floats: "nvfp4", "mxfp4", "fp8" or "mxfp8".
        num_experts: held here, or to route to; num_groups: of `route`.
        hidden, intermediate, gated: sizes of an expert, and whether it has a gate; hidden is also the width of what is quantised.
        kind: of the function between the two matrices (`experts.Activation`).
        calibrated: the experts have input scales, which fix the global scales of nvfp4 activations.
        batch_invariant: bits of a token may not depend on the others.
        fused: what a quantiser computes in front: "swiglu", "norm" or "four_over_six".
    """

    op: str
    target: Target
    format: BlockFormat | None = None
    layout: str | None = None
    activations: str | None = None
    dtype: torch.dtype | None = None
    quantized: str | None = None
    num_experts: int = 0
    num_groups: int = 1
    hidden: int = 0
    intermediate: int = 0
    gated: bool = True
    kind: ActivationKind = "swiglu"
    calibrated: bool = False
    batch_invariant: bool = False
    fused: str | None = None

    def __str__(self) -> str:
        parts = [self.target.arch]
        if self.activations is not None:
            parts += [repr(self.format) if self.format else "dense weights", f"layout {self.layout}", f"activations {self.activations}"]
        elif self.format is not None:
            parts.append(repr(self.format))
        if self.quantized is not None:
            parts.append(f"hidden states in {self.quantized}")
        elif self.dtype is not None:
            parts.append(str(self.dtype))
        return ", ".join(parts)


def layer_problem(
    op: str, experts: Any, target: Target, layout: str, activations: str, hidden: Hidden | None = None, *, batch_invariant: bool = False
) -> Problem:
    """The problem of a layer op on these experts (storage of any layout) and, where they are known, hidden states.

    Raises:
        InputError: as `quantized_format`.
    """
    return Problem(
        op,
        target,
        experts.format,
        layout,
        activations,
        dtype=hidden.dtype if isinstance(hidden, torch.Tensor) else None,
        quantized=None if hidden is None else quantized_format(hidden, op),
        num_experts=experts.num_experts,
        hidden=experts.hidden,
        intermediate=experts.intermediate,
        gated=experts.activation.gated,
        kind=experts.activation.kind,
        calibrated=experts.w13_input_scale is not None and experts.w2_input_scale is not None,
        batch_invariant=batch_invariant,
    )


def quantized_format(hidden: Hidden, where: str) -> str | None:
    """The format in which hidden states arrive: None for floats.

    Raises:
        InputError: scales in blocks of 128, or in another layout than "linear", which no kernel reads.
    """
    if isinstance(hidden, torch.Tensor):
        return None
    if hidden.scale_layout != "linear":
        raise InputError("scales of hidden are in tiles", where=where, given=repr(hidden.scale_layout), needed="'linear'")
    if isinstance(hidden, QuantTensor):
        return hidden.format.name
    if hidden.scaling == "block":
        raise InputError("hidden has a scale per block of 128", where=where, given="'block'", needed="'token' or 'mx'")
    return "fp8" if hidden.scaling == "token" else "mxfp8"


class Size(NamedTuple):
    """How much of a problem there is: tokens (rows, of a quantiser), and experts per token."""

    num_tokens: int
    top_k: int = 1

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k


class Support(NamedTuple):
    """Whether a kernel runs a problem, and why, or why not: `reason` is never empty.

    "slow": it is correct and runs, but on this GPU something faster is to be expected; the reason says what runs and what would be faster.
    """

    verdict: Literal["yes", "slow", "no"]
    reason: str

    @property
    def runs(self) -> bool:
        return self.verdict != "no"

    @staticmethod
    def yes(reason: str) -> Support:
        return Support("yes", reason)

    @staticmethod
    def slow(reason: str) -> Support:
        return Support("slow", reason)

    @staticmethod
    def no(reason: str) -> Support:
        return Support("no", reason)


class Provider(Protocol):
    """A kernel: a module with these names. `supports` and `run` are all that it must have; a module without the others means what stands here.

    Only the module itself knows its name, its layouts and its architecture. The table lists it.
    """

    capturable: bool = True
    """Whether a call can be captured in a CUDA graph: it never waits for the device."""

    supports: Callable[[Problem], Support]

    run: Callable[..., Any]
    """The op, with the signature of its twin in `kernels.reference`, and `config=None`: one of `configs`; None: what `choose_config` picks."""

    @staticmethod
    def layout(problem: Problem) -> str:
        """The layout of weights that it reads fastest, `problem.layout` left open."""
        return "canonical"

    @staticmethod
    def configs(problem: Problem) -> tuple[Hashable, ...]:
        """Every configuration that can run the problem; empty where there is nothing to choose and nothing to compile."""
        return ()

    @staticmethod
    def choose_config(problem: Problem, size: Size) -> Hashable | None:
        """The configuration for so many tokens, from what the host knows. Touches no device."""
        return None

    @staticmethod
    def takes(problem: Problem, size: Size, config: Any) -> bool:
        """Whether one of `configs` can run so many tokens. Tables say what is fastest for a range of them."""
        return True

    @staticmethod
    def rivals(problem: Problem, size: Size, config: Any) -> tuple[Hashable, ...]:
        """What else of `configs` than `config` may be fastest for so many tokens: what a tuner races."""
        return ()

    sources: tuple[str, ...] = ()
    """Modules whose code decides which configuration is fastest. What was measured with other code does not count."""

    @staticmethod
    def variants(problem: Problem, size: Size, config: Hashable | None) -> frozenset[Hashable]:
        """What else is compiled for so many tokens beside `config`: `warm_up` sees to each once."""
        return frozenset()

    @staticmethod
    def workspace_nbytes(problem: Problem, size: Size, config: Hashable | None) -> int:
        """The most that a call takes of a `workspace.Workspace`; a kernel that leaves it out takes its memory from torch."""
        return 0

    @staticmethod
    def rounds_weights(config: Hashable | None) -> bool:
        """Whether it multiplies, with this configuration, by weights rounded to e4m3 (`weights.hopper.rounding_fp8`) instead of by the FP4 values."""
        return False


def plain_torch(problem: Problem) -> Support:
    """What the reference says where nothing keeps it from running."""
    return Support.yes("plain torch, the definition") if problem.target.is_cpu else Support.slow("plain torch runs instead")


def takes_16_bits(problem: Problem) -> Support:
    """What the Triton quantisers say of a problem: compute capability 8.0, for redux.sync and bf16, and 16-bit inputs."""
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return Support.no(f"takes bfloat16 and float16, not {problem.dtype}")
    return needs_capability(problem.target, 80) or Support.yes("Triton, one pass")


def needs_capability(target: Target, capability: int) -> Support | None:
    """The refusal of a GPU older than compute capability `capability` (80 is 8.0), or None."""
    if int(target.arch.removeprefix("sm_")) >= capability:
        return None
    return Support.no(f"needs compute capability {capability // 10}.{capability % 10} or newer, this is {target.arch}")
