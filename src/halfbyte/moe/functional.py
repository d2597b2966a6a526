"""`fused_moe`: the mixture-of-experts layer as a pure function.

Under torch.compile it is one op, `halfbyte::fused_moe` of `moe.ops`, which the compiler does not look into. Outside, it is a plain call.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from halfbyte.arguments import check_integers, check_type
from halfbyte.device import Target, current
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.experts import ExpertMap
from halfbyte.formats.activation_formats import ActivationFormat, check_activations
from halfbyte.kernels import tuned
from halfbyte.kernels.problem import Hidden, Problem, Size, layer_problem
from halfbyte.kernels.table import KernelChoice, choose
from halfbyte.kernels.workspace import Workspace, lend
from halfbyte.moe.checks import check_call, check_known_ids, check_prepared, resolve_config, resolve_map
from halfbyte.weights import PreparedExperts
from halfbyte.weights.layouts import Storage


class Call(NamedTuple):
    """What a call of a layer is asked for beside its tensors.

    Attributes:
        layout, target: of the prepared experts.
        activations, batch_invariant, backend, config: as in `fused_moe`.
        expert_map: which experts are held here.
    """

    layout: str
    target: Target
    activations: ActivationFormat = "bf16"
    batch_invariant: bool = False
    backend: str | None = None
    config: Hashable | None = None
    expert_map: ExpertMap = ExpertMap()


def fused_moe(
    hidden: Hidden,
    experts: PreparedExperts,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activations: ActivationFormat | None = None,
    out: torch.Tensor | None = None,
    expert_map: ExpertMap | None = None,
    expert_offset: int | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
    workspace: Workspace | None = None,
    check_ids: bool = False,
    config: Hashable | None = None,
) -> torch.Tensor:
    """sum over j of topk_weights[t, j] * expert(topk_ids[t, j])(hidden[t]), accumulated in fp32 and rounded once.

    Args:
        hidden: [T, H] bf16, fp16 or fp32; or what has been quantised already, by a dispatch or a fused norm: a `QuantTensor` (NVFP4, MXFP4) or an
            `Fp8Tensor` with one scale per token or MXFP8 blocks, scales in layout "linear". Its values are taken as they are; `activations` then
            says only what becomes of the values between the two products.
        experts: from `prepare`, on the same device.
        topk_ids: [T, k] int32 or int64. Ids of experts that are not held here (-1, experts of other ranks) contribute nothing: summed over the
            ranks, the results are the whole layer.
        topk_weights: [T, k] fp32 (bf16 and fp16 are widened).
        activations: what the two matrix products see of their inputs: "bf16" (their own dtype), "fp8", "nvfp4" or "mxfp8"
            (`formats.activation_formats`); by default what the experts were prepared for. With "fp8" and many tokens, the Hopper kernels also round
            the weights to e4m3: no change for MXFP4 but in freak rows, 2 % of the weights' norm for NVFP4
            (`weights.hopper.rounding_fp8.weight_error` measures it).
        out: [T, H] to write to; hidden's dtype (bf16 where it is quantised), or fp32 for partial sums that are rounded later.
        expert_map: which experts are held here, where they are not a contiguous slice.
        expert_offset: id of the first expert held here, the short form of a map; by default what the weights say (0 for a whole layer).
        backend: the name of the only kernel allowed; by default the table chooses.
        batch_invariant: a token's result does not depend, bit for bit, on which other tokens are in the call, nor on how many. Costs speed, because
            kernels and tiles no longer follow the number of tokens.
        workspace: memory for what lies between hidden and the result, which the calls of many layers may share: one per device and stream, of
            `workspace_nbytes`. By default from torch's allocator. Not under torch.compile.
        check_ids: refuse ids that name no expert of the layer, other than -1; otherwise they contribute nothing, like experts of other ranks. Waits
            for the device. Not under torch.compile.
        config: one of the kernel's configurations, for tuning; by default it picks one by the number of tokens. Not under torch.compile.

    Returns:
        [T, H] of hidden's dtype (bf16 where it is quantised), or `out`.

    Raises:
        InputError: a shape, dtype, device or name does not fit. (torch.compile, which finds it while it traces, wraps it in an error of its own.)
        UnsupportedError: no kernel applies; the message lists each with its reason.

    >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    >>> w = halfbyte.ExpertWeights(halfbyte.quantize(w13, halfbyte.NVFP4), halfbyte.quantize(w2, halfbyte.NVFP4))
    >>> hidden, logits = torch.randn(3, 32, dtype=torch.bfloat16), torch.randn(3, 4)
    >>> routing = halfbyte.route(logits, top_k=2)
    >>> halfbyte.fused_moe(hidden, halfbyte.prepare(w), routing.ids, routing.weights).shape
    torch.Size([3, 32])
    """
    check_prepared(experts, "fused_moe")
    activations = experts.activations if activations is None else activations
    expert_map = resolve_map(experts.storage, expert_map, expert_offset, "fused_moe")
    if torch.compiler.is_compiling():
        given = [f"{name}=" for name, value in (("config", config), ("workspace", workspace), ("check_ids", check_ids or None)) if value is not None]
        if given or not isinstance(hidden, torch.Tensor):
            needed = "floats, and no config=, workspace= or check_ids="
            raise UnsupportedError("not traced by torch.compile", where="fused_moe", given=", ".join(given) or type(hidden).__name__, needed=needed)
        held = (expert_map.first, expert_map.local_of_copy, expert_map.copies)
        arguments = (experts.description, experts.layout, topk_ids, topk_weights, activations, *held, backend, batch_invariant)
        tensors = list(experts.storage.tensors.values())
        if out is None:
            return torch.ops.halfbyte.fused_moe(hidden, tensors, *arguments)
        torch.ops.halfbyte.fused_moe_out(hidden, tensors, *arguments, out)
        return out
    if workspace is not None:
        check_type("fused_moe", Workspace, workspace=workspace)
    call = Call(experts.layout, experts.target, activations, bool(batch_invariant), backend, config, expert_map)
    if check_ids:
        check_known_ids(topk_ids, experts.storage, expert_map, "fused_moe")
    with lend(workspace):
        result = run(hidden, experts.storage, topk_ids, topk_weights, call, out)
    if result.requires_grad or not torch.is_grad_enabled():  # plain torch has a gradient
        return result
    floats = [tensor for tensor in (hidden, topk_weights) if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    return _NoGradient.apply(result, *floats) if floats else result


class _NoGradient(torch.autograd.Function):
    """The first argument, as a function of the others whose gradient is an error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise InputError("this kernel has no gradient", where="fused_moe", next_step="take backend='reference', or detach hidden and topk_weights")


def workspace_nbytes(
    experts: PreparedExperts, max_tokens: int, top_k: int, *, activations: ActivationFormat | None = None, batch_invariant: bool = False
) -> int:
    """The bytes of a `Workspace` that hold all that calls of up to `max_tokens` tokens need between their input and their result.

    The largest over several layers serves them all. 0 where the kernel of these experts takes its memory from torch in any case.

    Raises:
        InputError, UnsupportedError: as `fused_moe`.

    >>> w = halfbyte.ExpertWeights(*(halfbyte.quantize(torch.randn(4, n, 32), halfbyte.MXFP4) for n in (64, 32)))
    >>> halfbyte.workspace_nbytes(halfbyte.prepare(w), max_tokens=8192, top_k=2)
    0
    """
    check_prepared(experts, "workspace_nbytes")
    check_integers("workspace_nbytes", 0, max_tokens=max_tokens, top_k=top_k)
    activations = experts.activations if activations is None else activations
    check_activations(activations, "workspace_nbytes")
    problem = layer_problem("fused_moe", experts.storage, experts.target, experts.layout, activations, batch_invariant=bool(batch_invariant))
    return _most_nbytes(choose(problem), problem, max_tokens, top_k)


@functools.cache  # it looks at every number of tokens, and most layers of a model are alike
def _most_nbytes(kernel: KernelChoice, problem: Problem, max_tokens: int, top_k: int) -> int:
    most = {kernel.choose_config(problem, Size(num_tokens, top_k)): Size(num_tokens, top_k) for num_tokens in range(1, max_tokens + 1)}
    return max((kernel.workspace_nbytes(problem, size, config) for config, size in most.items()), default=0)


def run(
    hidden: Hidden, experts: Storage, topk_ids: torch.Tensor, topk_weights: torch.Tensor, call: Call, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`fused_moe` with the prepared experts in parts."""
    check_call(hidden, experts, topk_ids, topk_weights, call.activations, out)
    problem = layer_problem("fused_moe", experts, call.target, call.layout, call.activations, hidden, batch_invariant=call.batch_invariant)
    if call.backend is not None:
        check_type("fused_moe", str, backend=call.backend)
    kernel = choose(problem, call.backend)
    config = resolve_config(call.config, kernel, problem, Size(*topk_ids.shape), "fused_moe")
    if tuned.seen is not None:
        tuned.seen.add((problem, topk_ids.shape[1]))
    if not call.expert_map.is_slice:
        topk_ids = call.expert_map.local(topk_ids)
    options = {"activations": call.activations, "expert_offset": call.expert_map.first, "batch_invariant": call.batch_invariant}
    with current(experts.device):
        return kernel.run(hidden, experts, topk_ids, topk_weights, out=out, config=config, **options)
