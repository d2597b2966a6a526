"""What the functions of the layer make of their arguments: the map and the configuration of a call, and InputError for what does not fit."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable
from typing import cast

import torch

from halfbyte.arguments import check_tensors, check_type, check_writable
from halfbyte.errors import InputError
from halfbyte.experts import ExpertMap
from halfbyte.formats import Fp8Tensor, QuantTensor
from halfbyte.formats.activation_formats import check_activations
from halfbyte.kernels.problem import Hidden, Problem, Size, quantized_format
from halfbyte.kernels.table import KernelChoice
from halfbyte.weights import PreparedExperts
from halfbyte.weights.layouts import Storage

IDS, FLOATS = (torch.int32, torch.int64), (torch.bfloat16, torch.float16, torch.float32)
_FROM_FIRST = ExpertMap()  # to make one takes the host longer than a look at it
_BLOCK_OF_ACTIVATIONS = {"nvfp4": 16, "mxfp8": 32}


def resolve_map(experts: Storage, expert_map: ExpertMap | None, expert_offset: int | None, where: str) -> ExpertMap:
    """The map of a call, by default what the weights say. Raises InputError where both are given, or one is something else."""
    if expert_map is None:
        if expert_offset is None and experts.first_expert == 0:
            return _FROM_FIRST
        return ExpertMap(experts.first_expert if expert_offset is None else expert_offset)
    check_type(where, ExpertMap, expert_map=expert_map)
    if expert_offset is not None:
        raise InputError("two ways to say which experts are held here", where=where, given="expert_map= and expert_offset=", needed="one of the two")
    return expert_map


def resolve_config(config: Hashable | None, kernel: KernelChoice, problem: Problem, size: Size, where: str) -> Hashable | None:
    """The configuration of a call, by default the kernel's choice. Raises InputError for one that this kernel does not have or that cannot run the
    call."""
    if config is None:
        return kernel.choose_config(problem, size)
    configs = kernel.configs(problem)
    if not configs:
        needed = "None: this kernel has no configurations"
    elif problem.batch_invariant and config not in configs:
        needed = f"with batch_invariant, None or one of {', '.join(map(repr, configs))}"
    elif type(config) not in {type(known) for known in configs}:
        needed = f"None, or one like {configs[0]!r}"
    elif not kernel.takes(problem, size, config):
        needed = f"None, or one for {problem.op} of {size.num_tokens} tokens with {problem.activations} activations"
    else:
        return config
    raise InputError("config does not fit", where=where, given=reprlib.repr(config), needed=needed)


def config_of_sorted(config: Hashable | None, kernel: KernelChoice, problem: Problem, size: Size) -> Hashable | None:
    """The configuration that rows were sorted for, before it was known what format they come in. Where it cannot multiply these, the one with the
    smallest tiles that hold as many."""
    if config is None or kernel.takes(problem, size, config):
        return config
    needed = config.max_rows  # type: ignore[attr-defined]  # every configuration of a layer has it
    takes = [other for other in kernel.configs(problem) if other.max_rows >= needed and kernel.takes(problem, size, other)]  # type: ignore[attr-defined]
    return min(takes, key=lambda other: other.max_rows)  # type: ignore[attr-defined]


def check_known_ids(topk_ids: torch.Tensor, experts: Storage, expert_map: ExpertMap, where: str) -> None:
    """Raise InputError for ids that name no expert of the layer, other than -1. Waits for the device."""
    in_layer = cast(int, experts.num_global_experts)  # as far as the weights know, which may have been made without the others
    num_experts = max(in_layer, expert_map.first + experts.num_experts) if expert_map.copies is None else len(expert_map.copies)
    check_tensor("topk_ids", topk_ids, IDS, None, None, experts.device, where)
    wrong = topk_ids[(topk_ids < -1) | (topk_ids >= num_experts)]
    if wrong.numel():
        raise InputError("ids name no expert", where=where, given=wrong.unique()[:8].tolist(), needed=f"0 .. {num_experts - 1}, or -1 for none")


def check_prepared(experts: object, where: str) -> None:
    """Raise InputError for what `prepare` has not made."""
    if not isinstance(experts, PreparedExperts):
        given = type(experts).__name__
        raise InputError("experts are not prepared", where=where, given=given, needed="PreparedExperts", next_step="call halfbyte.prepare(w)")


def check_call(
    hidden: Hidden, experts: Storage, topk_ids: torch.Tensor, topk_weights: torch.Tensor, activations: str, out: torch.Tensor | None = None,
    where: str = "fused_moe",
) -> None:  # fmt: skip
    """Raise what `fused_moe` raises for arguments that do not fit `experts`."""
    device, num_columns = experts.device, experts.hidden
    num_tokens = check_hidden(hidden, experts, where)
    check_tensor("topk_ids", topk_ids, IDS, num_tokens, None, device, where)
    check_tensor("topk_weights", topk_weights, FLOATS, num_tokens, topk_ids.shape[1], device, where)
    if out is not None:
        dtype = hidden.dtype if isinstance(hidden, torch.Tensor) else torch.bfloat16
        check_tensor("out", out, (dtype, torch.float32), num_tokens, num_columns, device, where)
        check_writable(where, out)
    check_activations(activations, where)
    block = _BLOCK_OF_ACTIVATIONS.get(activations, 1)
    if num_columns % block or experts.intermediate % block:
        given = f"hidden {num_columns}, intermediate {experts.intermediate}"
        raise InputError(f"activations do not divide into {activations} blocks", where=where, given=given, needed=f"multiples of {block}")


def check_hidden(hidden: Hidden, experts: Storage, where: str, num_tokens: int | None = None) -> int:
    """The number of tokens of hidden states that fit the experts; InputError where they do not, or are not `num_tokens`."""
    if isinstance(hidden, torch.Tensor):
        check_tensor("hidden", hidden, FLOATS, num_tokens, experts.hidden, experts.device, where)
        return hidden.shape[0]
    if not isinstance(hidden, QuantTensor | Fp8Tensor):
        needed = "torch.Tensor, QuantTensor or Fp8Tensor"
        raise InputError("hidden is no tensor", where=where, given=type(hidden).__name__, needed=needed)
    quantized_format(hidden, where)
    num_columns = hidden.codes.shape[-1] * (2 if isinstance(hidden, QuantTensor) else 1)
    fits = hidden.codes.ndim == 2 and num_columns == experts.hidden and num_tokens in (None, hidden.codes.shape[0])
    if not fits or hidden.codes.device != experts.device:
        given = f"{type(hidden).__name__} of {tuple(hidden.codes.shape)} codes on {hidden.codes.device}"
        needed = f"[{'any' if num_tokens is None else num_tokens}, {experts.hidden}] on {experts.device}"
        raise InputError("hidden does not fit", where=where, given=given, needed=needed)
    return hidden.codes.shape[0]


def check_sums(out: torch.Tensor, num_rows: int, num_columns: int, device: torch.device, where: str) -> None:
    """Raise InputError unless a sum of rows can be written to `out`: contiguous, of any float dtype."""
    check_tensor("out", out, FLOATS, num_rows, num_columns, device, where)
    check_writable(where, out)
    if not out.is_contiguous():
        raise InputError("out is not contiguous", where=where, given=out.stride(), needed="rows one after another")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    num_rows: int | None,
    num_columns: int | None,
    device: torch.device,
    where: str,
) -> None:
    """Raise InputError unless `tensor` is [num_rows, num_columns], None for any number, of one of the dtypes, on the device."""
    if not isinstance(tensor, torch.Tensor):
        check_tensors(where, **{name: tensor})
    shape = tensor.shape
    fits = len(shape) == 2 and num_rows in (None, shape[0]) and num_columns in (None, shape[1])
    if fits and tensor.dtype in dtypes and tensor.device == device and tensor.layout == torch.strided:
        return
    sizes = ", ".join("any" if size is None else str(size) for size in (num_rows, num_columns))
    raise InputError(
        f"{name} does not fit",
        where=where,
        given=f"{tensor.dtype} {tuple(shape)} on {tensor.device}" + ("" if tensor.layout == torch.strided else f", {tensor.layout}"),
        needed=f"{' or '.join(map(str, dict.fromkeys(dtypes)))} [{sizes}] on {device}",
    )
