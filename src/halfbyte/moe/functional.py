"""`fused_moe`: the mixture-of-experts layer as a pure function.

Under torch.compile it is one op, `halfbyte::fused_moe` of `moe.ops`, which the compiler does not look into. Outside, it is a plain call.
"""

from __future__ import annotations

import torch

from halfbyte.device import Target
from halfbyte.errors import InputError
from halfbyte.formats.activation_formats import ACTIVATION_FORMATS, ActivationFormat
from halfbyte.kernels.table import Problem, choose
from halfbyte.weights import PreparedExperts
from halfbyte.weights.prepared import Experts

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK_OF_ACTIVATIONS = {"nvfp4": 16, "mxfp8": 32}


def fused_moe(
    hidden: torch.Tensor,
    experts: PreparedExperts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    out: torch.Tensor | None = None,
    expert_offset: int | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """sum over j of weights[t, j] * expert(ids[t, j])(hidden[t]), accumulated in fp32 and rounded once.

    Args:
        hidden: [T, H] bf16, fp16 or fp32.
        experts: from `prepare`, on the same device.
        ids: [T, k] int32 or int64. Ids outside expert_offset .. expert_offset + E (-1, experts of other ranks) contribute nothing: summed over
            the ranks, the results are the whole layer.
        weights: [T, k] fp32 (bf16 and fp16 are widened).
        activations: what the two matrix products see of their inputs: "bf16" (their own dtype), "fp8", "nvfp4" or "mxfp8"
            (`formats.activation_formats`).
            With "fp8" and many tokens, the Hopper kernels also round the weights to e4m3: no change for MXFP4 but in freak rows, 2 % of the weights'
            norm for NVFP4 (`weights.hopper.rounding_fp8.weight_error` measures it).
        out: [T, H] to write to; hidden's dtype, or fp32 for partial sums that are rounded later.
        expert_offset: id of the first expert held here; by default what the weights say (0 for a whole layer).
        backend: the name of the only kernel allowed; by default the table chooses.
        batch_invariant: a token's result does not depend, bit for bit, on which other tokens are in the call, nor on how many. Costs speed, because
            kernels and tiles no longer follow the number of tokens.

    Returns:
        [T, H] of hidden's dtype, or `out`.

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
    if not isinstance(experts, PreparedExperts):
        given = type(experts).__name__
        raise InputError("experts are not prepared", where="fused_moe", given=given, needed="PreparedExperts", next_step="call halfbyte.prepare(w)")
    offset = experts.experts.first_expert if expert_offset is None else expert_offset
    if torch.compiler.is_compiling():
        tensors = list(experts.experts.tensors.values())
        arguments = (hidden, tensors, experts.description, experts.layout, ids, weights, activations, offset, backend, batch_invariant)
        if out is None:
            return torch.ops.halfbyte.fused_moe(*arguments)
        torch.ops.halfbyte.fused_moe_out(*arguments, out)
        return out
    return run(hidden, experts.experts, experts.layout, experts.target, ids, weights, activations, offset, backend, batch_invariant, out)


def run(
    hidden: torch.Tensor,
    experts: Experts,
    layout: str,
    target: Target,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activations: ActivationFormat,
    expert_offset: int,
    backend: str | None,
    batch_invariant: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`fused_moe` with the prepared experts in parts."""
    check(hidden, experts, ids, weights, activations, out)
    kernel = choose(Problem("fused_moe", target, experts.format, layout, activations, hidden.dtype), backend)
    options = {"activations": activations, "expert_offset": expert_offset, "batch_invariant": batch_invariant}
    return kernel.function(hidden, experts, ids, weights, out=out, **options)


def check(hidden: torch.Tensor, experts: Experts, ids: torch.Tensor, weights: torch.Tensor, activations: str, out: torch.Tensor | None) -> None:
    """Raise what `fused_moe` raises for arguments that do not fit `experts`."""
    _check_tensor("hidden", hidden, _FLOATS, (None, experts.hidden), experts.device)
    num_tokens = hidden.shape[0]
    _check_tensor("ids", ids, (torch.int32, torch.int64), (num_tokens, None), experts.device)
    _check_tensor("weights", weights, _FLOATS, (num_tokens, ids.shape[1]), experts.device)
    if out is not None:
        _check_tensor("out", out, (hidden.dtype, torch.float32), (num_tokens, experts.hidden), experts.device)
    if activations not in ACTIVATION_FORMATS:
        raise InputError("unknown activation format", where="fused_moe", given=repr(activations), needed=" or ".join(ACTIVATION_FORMATS))
    block = _BLOCK_OF_ACTIVATIONS.get(activations, 1)
    if experts.hidden % block or experts.intermediate % block:
        given = f"hidden {experts.hidden}, intermediate {experts.intermediate}"
        raise InputError(f"activations do not divide into {activations} blocks", where="fused_moe", given=given, needed=f"multiples of {block}")


def _check_tensor(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, int | None], device: torch.device
) -> None:
    fits = tensor.ndim == 2 and all(size in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True))
    if fits and tensor.dtype in dtypes and tensor.device == device:
        return
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    raise InputError(
        f"{name} does not fit",
        where="fused_moe",
        given=f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}",
        needed=f"{' or '.join(map(str, dict.fromkeys(dtypes)))} [{sizes}] on {device}",
    )
