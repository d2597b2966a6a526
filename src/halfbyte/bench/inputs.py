"""What a measured call is given: expert weights, hidden states, and routings of three kinds."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from halfbyte.bench.room import check_room
from halfbyte.bench.shapes import MoEShape
from halfbyte.checkpoint.load import load_experts
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import InputError
from halfbyte.experts import ExpertWeights
from halfbyte.formats import MXFP4, NVFP4, BlockFormat, QuantTensor

RoutingKind = Literal["uniform", "skewed", "one-expert"]
ROUTING_KINDS: tuple[str, ...] = get_args(RoutingKind)

# First and last byte of the random block scales: e4m3 0.5 .. 1.875, e8m0 2^-9 .. 2^-5.
_SCALE_BYTES = {NVFP4.name: (48, 63), MXFP4.name: (118, 122)}
_NVFP4_GLOBAL_SCALE = 0.0057  # random codes have an rms of 2.9, these block scales of 1.2: weights of 0.02


class Call(NamedTuple):
    """Inputs of one call: hidden bf16 [T, H], ids int32 [T, k], weights fp32 [T, k]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def random_experts(shape: MoEShape, format: BlockFormat, device: torch.device, seed: int) -> ExpertWeights:
    """Draw codes and block scales directly, as weights of rms 0.02 (NVFP4) or 0.05 (MXFP4).

    That is seconds faster than to quantise, needs no memory beside the result, and costs a kernel the same. NVFP4 global scales differ by up to
    3 times between experts, and between gate and up, so that a kernel that mixes them up is caught.

    Raises:
        InputError: hidden or intermediate is not a multiple of the format's block.
        UnsupportedError: there is no memory for them.

    >>> w = random_experts(MoEShape("tiny", 64, 32, 4, 2), halfbyte.NVFP4, torch.device("cpu"), seed=0)
    >>> w.w13.shape, round(w.w13.dequantize().std().item(), 2)
    (torch.Size([4, 64, 64]), 0.02)
    """
    for size, dimension in ((shape.hidden, "hidden"), (shape.intermediate, "intermediate")):
        if size % format.block:
            raise InputError(
                f"{dimension} does not divide into {format!r} blocks", where=shape.name, given=size, needed=f"a multiple of {format.block}"
            )
    check_room(shape.num_experts * shape.expert_bytes(format), device, f"the experts of {shape.name}")
    generator = torch.Generator(device).manual_seed(seed)
    experts, rows13 = shape.num_experts, shape.halves * shape.intermediate

    def quantised(rows: int, columns: int, global_shape: tuple[int, ...]) -> QuantTensor:
        low, high = _SCALE_BYTES[format.name]
        codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=device, generator=generator)
        scales = torch.randint(low, high + 1, (experts, rows, columns // format.block), dtype=torch.uint8, device=device, generator=generator)
        global_scale = None
        if format.has_global_scale:
            global_scale = (0.5 + torch.rand(global_shape, dtype=torch.float32, device=device, generator=generator)) * _NVFP4_GLOBAL_SCALE
        return QuantTensor(codes, scales, global_scale, format)

    def bias(rows: int) -> torch.Tensor | None:
        return (0.1 * torch.randn(experts, rows, dtype=torch.float32, device=device, generator=generator)).bfloat16() if shape.has_bias else None

    w13 = quantised(rows13, shape.hidden, (experts, 2) if shape.halves == 2 else (experts,))
    w2 = quantised(shape.hidden, shape.intermediate, (experts,))
    return ExpertWeights(w13, w2, shape.activation, bias(rows13), bias(shape.hidden))


def model_experts(model: str, layer: int, device: torch.device) -> tuple[MoEShape, ExpertWeights]:
    """Read one layer of a checkpoint, and its sizes.

    Raises:
        CheckpointError, UnsupportedError: as `load_experts`.
        InputError: its experts are not in FP4.
    """
    checkpoint = Checkpoint.open(model)
    experts = load_experts(checkpoint, layer, device)
    name = f"{checkpoint.path.name}:{layer}"
    if experts.format is None:
        raise InputError("these experts are not in FP4", where=name, needed="NVFP4 or MXFP4", next_step="run: halfbyte quantize")
    sizes = (experts.hidden, experts.intermediate, experts.num_experts, checkpoint.moe.top_k)
    return MoEShape(name, *sizes, experts.activation, experts.w13_bias is not None, experts.format), experts


def random_call(shape: MoEShape, num_tokens: int, routing: RoutingKind, device: torch.device, seed: int) -> Call:
    """Draw hidden states and k distinct experts for every token.

    uniform     every expert is as likely as another
    skewed      popularity falls as 1 / rank (Zipf), the ranks drawn anew for every call
    one-expert  one expert, drawn anew for every call, gets all tokens; their other k - 1 slots are uniform

    Raises:
        UnsupportedError: there is no memory for them.
    """
    check_room(4 * num_tokens * max(shape.hidden, shape.num_experts), device, f"{num_tokens} tokens")
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*sizes: int) -> torch.Tensor:
        return torch.rand(sizes, dtype=torch.float32, device=device, generator=generator).clamp_(min=1e-12)

    scores = -torch.log(-torch.log(uniform(num_tokens, shape.num_experts)))  # Gumbel: the top k of score + log p are a draw by p without replacement
    if routing == "skewed":
        scores -= torch.log(1.0 + torch.randperm(shape.num_experts, dtype=torch.int64, device=device, generator=generator))
    elif routing == "one-expert":
        scores[:, torch.randint(shape.num_experts, (1,), dtype=torch.int64, device=device, generator=generator)] = torch.inf
    ids = scores.topk(shape.top_k, dim=1).indices.int()
    weights = torch.randn(num_tokens, shape.top_k, dtype=torch.float32, device=device, generator=generator).softmax(dim=1)
    hidden = torch.randn(num_tokens, shape.hidden, dtype=torch.float32, device=device, generator=generator).bfloat16()
    return Call(hidden, ids, weights)
