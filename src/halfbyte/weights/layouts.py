"""The arrangements in which expert weights can lie, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch

from halfbyte.arguments import check_name
from halfbyte.errors import InputError
from halfbyte.experts import ExpertWeights
from halfbyte.weights import canonical
from halfbyte.weights.engines.common import EngineExperts
from halfbyte.weights.engines.cutlass import CUTLASS
from halfbyte.weights.engines.trtllm_gen import TRTLLM_GEN
from halfbyte.weights.hopper.layout import REUSED, HopperExperts, allocate
from halfbyte.weights.hopper.pack import pack, unpack

Storage: TypeAlias = ExpertWeights | HopperExperts | EngineExperts


@dataclass(frozen=True)
class Layout:
    """An arrangement of experts in storage of its own, a dataclass with `tensors` and `with_tensors`.

    Attributes:
        purpose: what it is, and who reads it.
        storage: the class of what holds it.
        allocate: (w, device) to uninitialised storage for the experts of w.
        pack: (w, storage, first=0, scale_check=None) arranges the experts of w, one at a time, as experts `first` and following of the storage;
            `scale_check`: a `checks.ScaleCheck`.
        unpack: storage to canonical experts.
        reused: canonical tensor in whose storage each tensor may lie while `pack` runs, where the sizes are the same.
        foreign: made for another project's kernels, which halfbyte calls (`kernels.flashinfer`).
    """

    purpose: str
    storage: type
    allocate: Callable[[ExpertWeights, torch.device | str], Any]
    pack: Callable[..., None]
    unpack: Callable[[Any], ExpertWeights]
    reused: Mapping[str, str] = field(default_factory=dict)
    foreign: bool = False


LAYOUTS = {
    "canonical": Layout(
        "the checkpoint's own arrangement, read by the portable kernels on any device",
        ExpertWeights,
        canonical.allocate,
        canonical.pack,
        canonical.unpack,
    ),
    "hopper": Layout("register fragments in 64 x 64 tiles, read by the sm_90 kernels", HopperExperts, allocate, pack, unpack, REUSED),
    "hopper_fp8": Layout(
        "hopper with codes arranged for fp8 tensor cores, for layers called with activations='fp8'",
        HopperExperts,
        partial(allocate, words_for="fp8"),
        pack,
        unpack,
        REUSED,
    ),
    "trtllm_gen": Layout(
        "shuffled rows and 128x4 scales, read by the trtllm-gen kernels of FlashInfer on Blackwell",
        EngineExperts,
        TRTLLM_GEN.allocate,
        TRTLLM_GEN.pack,
        TRTLLM_GEN.unpack,
        foreign=True,
    ),
    "cutlass": Layout(
        "rows in order and 128x4 scales, read by the CUTLASS kernels of FlashInfer on Blackwell",
        EngineExperts,
        CUTLASS.allocate,
        CUTLASS.pack,
        CUTLASS.unpack,
        foreign=True,
    ),
}
POLICIES = {"packed": "weights stay in 4 bits"}


def is_arranged_in_place(layout: str) -> bool:
    """Whether `prepare(..., in_place=True)` can make it: out of the memory of the weights, or, "canonical", with nothing to do."""
    return layout == "canonical" or bool(LAYOUTS[layout].reused)


def check_names(layout: str, policy: str) -> str:
    """Return the layout by its own name ("triton", the kernels that read it, is "canonical"); "auto" stays.

    Raises:
        InputError: no such layout or policy.
    """
    check_name("residency policy", policy, POLICIES, "prepare")
    if not isinstance(layout, str) or layout not in ("auto", "triton", *LAYOUTS):
        available = ", ".join(f"{name!r} ({known.purpose})" for name, known in LAYOUTS.items())
        raise InputError("unknown layout", where="prepare", given=repr(layout), needed=f"'auto' or {available}")
    return "canonical" if layout == "triton" else layout
