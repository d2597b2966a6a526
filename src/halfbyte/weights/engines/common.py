"""What the layouts of the Blackwell engines have in common: plain FP4 codes in some order of rows, block scales in 128x4 tiles, and scalars.

    codes   uint8 [E, N, K/2]    rows in the engine's order, columns as in the checkpoint
    scales  e4m3 or e8m0 [E, ceil(N, 128), ceil(K/block, 4)]    rows in the same order, each expert in `128x4` tiles (`formats.scale_layout`)
    biases and scalars           fp32; see `EngineExperts`

w13 is [up; gate] for both engines, the checkpoint [gate; up]. H and I are padded with zeros, each half of w13 on its own. `trtllm_gen.py` and
`cutlass.py` have what differs, as an `Arrangement`.

The order of rows is a view, never an index: `Arrangement.rows` shows storage as [..., blocks, 8, inner, C], in which entry (b, c, a) is canonical row
(8 b + c) inner + a of one half. Packing is one strided copy into it, unpacking the copy back. H and I are multiples of 16, so rows never end inside
`inner` (at most 4), though they may end inside a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from halfbyte.errors import InputError
from halfbyte.experts import Activation, ExpertWeights
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.formats.scale_layout import padded_shape, words_128x4
from halfbyte.weights.checks import ScaleCheck, check_scales, fp4_matrices
from halfbyte.weights.engines.scalars import Multipliers, multipliers_of

# Experts whose scales are rearranged at a time: the scratch is then at most as large as the codes of one expert (NVFP4: 8 bytes of codes per scale).
SCALES_AT_A_TIME = 8
_SCALES = ("w13_scales", "w2_scales")


@dataclass(frozen=True, eq=False)
class EngineExperts:
    """The experts of one layer as an engine reads them; `hidden` and `intermediate` are the sizes before padding.

    Attributes:
        w13_codes, w2_codes: uint8 [E, N, K/2].
        w13_scales, w2_scales: float8_e4m3fn (NVFP4) or uint8 e8m0 (MXFP4), [E, ceil(N, 128), ceil(K/block, 4)] in 128x4 tiles.
        w13_input_scale_quant: fp32 [E], all equal, the encode multiplier for the activations of the layer; 1 where there are no input scales,
            which leaves scaling them to the engine, token by token.
        g1_alphas, g2_alphas: fp32 [E], what the two accumulators are multiplied by.
        g1_scale_c: fp32 [E], what the activated product is multiplied by before it is quantised (trtllm_gen).
        w2_input_scale_quant: fp32 [E], the encode multiplier for the activated product (cutlass).
        w13_bias, w2_bias: fp32 [E, N] in the order of the rows, or None.
        gemm1_alpha, gemm1_beta, gemm1_clamp_limit: fp32 [E], or None where the activation has none.
        layout: the name of the arrangement.
        canonical: the vectors of the canonical experts that the scalars and biases were made from, by their names there: `unpack` is exact with them.
            Input scales belong to the whole layer; every other tensor has one entry per expert.
    """

    w13_codes: torch.Tensor
    w13_scales: torch.Tensor
    w2_codes: torch.Tensor
    w2_scales: torch.Tensor
    w13_input_scale_quant: torch.Tensor
    g1_alphas: torch.Tensor
    g1_scale_c: torch.Tensor | None
    w2_input_scale_quant: torch.Tensor | None
    g2_alphas: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    gemm1_alpha: torch.Tensor | None
    gemm1_beta: torch.Tensor | None
    gemm1_clamp_limit: torch.Tensor | None
    canonical: dict[str, torch.Tensor]
    layout: str
    format: BlockFormat
    activation: Activation
    hidden: int
    intermediate: int
    first_expert: int
    num_global_experts: int

    def __post_init__(self) -> None:
        for name in _SCALES:
            object.__setattr__(self, name, getattr(self, name).view(self.format.scale_dtype))

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return EngineExperts, tuple((values | {name: values[name].view(torch.uint8) for name in _SCALES}).values())  # torch pickles no 8-bit floats

    @property
    def num_experts(self) -> int:
        return self.w13_codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.w13_codes.device

    @property
    def w13_input_scale(self) -> torch.Tensor | None:
        return self.canonical.get("w13_input_scale")

    @property
    def w2_input_scale(self) -> torch.Tensor | None:
        return self.canonical.get("w2_input_scale")

    @property
    def padded_hidden(self) -> int:
        return self.w2_codes.shape[1]

    @property
    def padded_intermediate(self) -> int:
        return self.w2_codes.shape[2] * 2

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name: "w13_codes", "g1_alphas", "canonical.w13_bias", ..."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        found = {name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
        return found | {f"canonical.{name}": tensor for name, tensor in self.canonical.items()}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> EngineExperts:
        """The same experts with other storage; names as in `tensors`."""
        own: dict[str, Any] = {name: tensors[name] for name in self.tensors if not name.startswith("canonical.")}
        return replace(self, **own, canonical={name: tensors[f"canonical.{name}"] for name in self.canonical})


@dataclass(frozen=True)
class Arrangement:
    """What distinguishes one engine: a layout.

    Attributes:
        multiples: (format, gated) to what H and I are padded to multiples of.
        rows: (storage [..., N, C], halves) to one view [..., blocks, 8, inner, C] for gate and one for up, or one for all rows.
        scalars: (multipliers, activation) to the scalars by name, and what the biases are divided by: fp32 [E] for gate, for up, for w2.
    """

    name: str
    multiples: Callable[[BlockFormat, bool], tuple[int, int]]
    rows: Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]
    scalars: Callable[[Multipliers, Activation], tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]

    def allocate(self, w: ExpertWeights, device: torch.device | str) -> EngineExperts:
        """Return storage for all experts of `w`, uninitialised, on `device` ("meta" too).

        Raises:
            InputError: the weights are dense, or their scales are not in layout "linear".
        """
        w13, _ = fp4_matrices(w, self.name)
        num_experts = w.num_experts
        multiple_h, multiple_i = self.multiples(w13.format, w.activation.gated)
        hidden, intermediate = _round_up(w.hidden, multiple_h), _round_up(w.intermediate, multiple_i)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            scale_shape = padded_shape("128x4", rows, columns // w13.format.block)
            codes = empty(num_experts, rows, columns // 2, dtype=torch.uint8)
            return codes, empty(num_experts, *scale_shape, dtype=w13.format.scale_dtype)

        rows = w.activation.halves * intermediate
        (w13_codes, w13_scales), (w2_codes, w2_scales) = matrix(rows, hidden), matrix(hidden, intermediate)
        nowhere = torch.empty(num_experts, dtype=torch.float32, device="meta")  # just to learn which scalars there are
        scalars, _ = self.scalars(Multipliers(nowhere, nowhere, nowhere, nowhere, nowhere), w.activation)
        return EngineExperts(
            w13_codes,
            w13_scales,
            w2_codes,
            w2_scales,
            **{name: empty(num_experts) if name in scalars else None for name in _SCALARS},  # type: ignore[arg-type]
            w13_bias=None if w.w13_bias is None else empty(num_experts, rows),
            w2_bias=None if w.w2_bias is None else empty(num_experts, hidden),
            canonical={name: empty(*tensor.shape, dtype=tensor.dtype) for name, tensor in _vectors(w).items()},
            layout=self.name,
            format=w13.format,
            activation=w.activation,
            hidden=w.hidden,
            intermediate=w.intermediate,
            first_expert=w.first_expert,
            num_global_experts=num_experts if w.num_global_experts is None else w.num_global_experts,
        )

    def pack(self, w: ExpertWeights, out: EngineExperts, first: int = 0, scale_check: ScaleCheck | None = None) -> None:
        """Write the experts of `w` to the experts `first` and following of `out`. More than `scale_check` could say is checked, and at once.

        `w` may lie on another device than `out`: one expert's codes are then copied over at a time. Beside `out` this needs at most the size of one
        expert. Exact: `unpack` gives every byte back.

        Raises:
            InputError: `w` does not fit `out`; a scale is negative, NaN or otherwise not usable; gate and up have different global scales and the
                activation a limit, which an engine has only one of. Nothing was written.
        """
        w13, w2 = fp4_matrices(w, self.name)
        _check_scalars(w, self)
        _check_fit(w, out, first, self)
        halves = w.activation.halves
        _pack_matrix(w13, out.w13_codes, out.w13_scales, first, halves, self)
        _pack_matrix(w2, out.w2_codes, out.w2_scales, first, 1, self)
        here = slice(first, first + w.num_experts)
        vectors = _vectors(w)
        for name, tensor in vectors.items():
            (out.canonical[name] if name.endswith("input_scale") else out.canonical[name][here]).copy_(tensor)
        scalars, (*divisors, w2_divisor) = self.scalars(multipliers_of(w), w.activation)
        for name, tensor in scalars.items():
            getattr(out, name)[here].copy_(tensor)
        if out.w13_bias is not None:
            biases = vectors["w13_bias"].float().chunk(halves, dim=1)
            for bias, divisor, rows in zip(biases, divisors[:halves], self.rows(out.w13_bias[here].unsqueeze(-1), halves), strict=True):
                _write(rows, (bias / divisor.unsqueeze(1)).unsqueeze(-1))
        if out.w2_bias is not None:
            bias = vectors["w2_bias"].float() / w2_divisor.unsqueeze(1)
            _write(self.rows(out.w2_bias[here].unsqueeze(-1), 1)[0], bias.unsqueeze(-1))

    def unpack(self, experts: EngineExperts) -> ExpertWeights:
        """Give the canonical experts back: the inverse of `pack`, byte by byte."""
        halves = experts.activation.halves
        vectors = {name: tensor.clone() for name, tensor in experts.canonical.items()}
        w13 = _unpack_matrix(experts.w13_codes, experts.w13_scales, halves, experts.intermediate, experts.hidden, experts.format, self)
        w2 = _unpack_matrix(experts.w2_codes, experts.w2_scales, 1, experts.hidden, experts.intermediate, experts.format, self)
        return ExpertWeights(
            QuantTensor(*w13, vectors.get("w13.global_scale"), experts.format),
            QuantTensor(*w2, vectors.get("w2.global_scale"), experts.format),
            experts.activation,
            **{name: vectors.get(name) for name in ("w13_bias", "w2_bias", "w13_input_scale", "w2_input_scale")},
            first_expert=experts.first_expert,
            num_global_experts=experts.num_global_experts,
        )


# The fields of EngineExperts that an arrangement may fill, as it needs them.
_SCALARS = (
    "w13_input_scale_quant", "g1_alphas", "g1_scale_c", "w2_input_scale_quant", "g2_alphas", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"
)  # fmt: skip


def _vectors(w: ExpertWeights) -> dict[str, torch.Tensor]:
    """Global scales, biases and input scales, by their canonical names."""
    return {name: tensor for name, tensor in w.tensors.items() if not name.endswith((".codes", ".scales"))}


def _check_fit(w: ExpertWeights, out: EngineExperts, first: int, arrangement: Arrangement) -> None:
    def described(x: ExpertWeights | EngineExperts, vectors: dict[str, torch.Tensor]) -> str:
        sizes = {name: tuple(tensor.shape[0 if name.endswith("input_scale") else 1 :]) for name, tensor in vectors.items()}
        listed = ", ".join(f"{name} {tensor.dtype} {sizes[name]}" for name, tensor in vectors.items())
        return f"{x.format!r} experts of hidden {x.hidden}, intermediate {x.intermediate}, {x.activation}, with {listed or 'no vectors'}"

    given, needed = described(w, _vectors(w)), described(out, out.canonical)
    if given != needed:
        raise InputError("the experts do not fit the storage", where=f"pack {arrangement.name}", given=given, needed=needed)
    if not 0 <= first <= out.num_experts - w.num_experts:
        given = f"experts {first} to {first + w.num_experts}"
        raise InputError("no room for these experts", where=f"pack {arrangement.name}", given=given, needed=f"0 to {out.num_experts}")


def _check_scalars(w: ExpertWeights, arrangement: Arrangement) -> None:
    """Refuse what an engine could not compute with. Weights without data ("meta") have nothing to refuse."""
    halves = w.activation.halves
    num_experts, num_global = w.num_experts, w.num_global_experts or 0
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "w13.global_scale": ((num_experts, halves), (num_experts, 1), (num_experts,)),
        "w2.global_scale": ((num_experts, 1), (num_experts,)),
        "w13_input_scale": ((num_global, halves), (num_global,)),
        "w2_input_scale": ((num_global,),),
    }
    for name, tensor in _vectors(w).items():
        if name in shapes and tuple(tensor.shape) not in shapes[name]:
            needed = " or ".join(map(str, shapes[name]))
            raise InputError(f"{name} does not fit", where="prepare", given=tuple(tensor.shape), needed=needed)
    check_scales(w, positive=True)
    if w.activation.limit is not None and w.device.type != "meta":
        scales = multipliers_of(w)
        different = int((scales.gate != scales.up).sum())
        if different:
            raise InputError(
                f"layout {arrangement.name!r} has one clamp limit for the accumulators of gate and up, whose global scales differ",
                where="prepare",
                given=f"limit {w.activation.limit:g}, different scales in {different} of {w.num_experts} experts",
                needed="equal global scales, or an activation without limit",
                next_step="use layout 'canonical' or 'hopper', which keep the two apart",
            )


def _pack_matrix(w: QuantTensor, codes: torch.Tensor, scales: torch.Tensor, first: int, halves: int, arrangement: Arrangement) -> None:
    raw, scratch = w.scales.view(torch.uint8), _scratch(scales, len(w.codes))
    for here in _steps(len(w.codes), w.device, codes.device):
        there = slice(first + here.start, first + here.stop)
        _copy_halves(codes[there], w.codes[here].to(codes.device), halves, arrangement, write=True)
        linear = scratch[: here.stop - here.start]
        _copy_halves(linear[:, : codes.shape[1]], raw[here].to(codes.device), halves, arrangement, write=True)
        words_128x4(scales[there]).copy_(linear.view(torch.int32).view(words_128x4(scales[there]).shape))


def _unpack_matrix(
    codes: torch.Tensor, scales: torch.Tensor, halves: int, rows: int, columns: int, format: BlockFormat, arrangement: Arrangement
) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical codes and scales of all experts; `rows` of one half."""
    num_experts = codes.shape[0]
    canonical_codes = codes.new_empty((num_experts, halves * rows, columns // 2))
    canonical_scales = codes.new_empty((num_experts, halves * rows, columns // format.block))
    scratch = _scratch(scales, num_experts)
    for here in _steps(num_experts, codes.device, codes.device):
        _copy_halves(codes[here], canonical_codes[here], halves, arrangement, write=False)
        linear, words = scratch[: here.stop - here.start], words_128x4(scales[here])
        linear.view(torch.int32).view(words.shape).copy_(words)
        _copy_halves(linear[:, : codes.shape[1]], canonical_scales[here], halves, arrangement, write=False)
    return canonical_codes, canonical_scales.view(format.scale_dtype)


def _steps(num_experts: int, source: torch.device, target: torch.device) -> Iterator[slice]:
    step = SCALES_AT_A_TIME if source == target else 1
    return (slice(expert, min(expert + step, num_experts)) for expert in range(0, num_experts, step))


def _scratch(scales: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Bytes for the scales of a few experts in the engine's row order, before they go into tiles; zero where padding stays."""
    return scales.new_zeros((min(num_experts, SCALES_AT_A_TIME), *scales.shape[1:]), dtype=torch.uint8)


def _copy_halves(storage: torch.Tensor, canonical: torch.Tensor, halves: int, arrangement: Arrangement, *, write: bool) -> None:
    """Copy bytes [n, N, C] of the storage from, or to, canonical rows [n, halves * M, c]."""
    storage, canonical = _in_words(storage, canonical)
    for half, rows in zip(canonical.chunk(halves, dim=1), arrangement.rows(storage, halves), strict=True):
        if write:
            _write(rows, half)
        else:
            _read(rows, half)


def _write(rows: torch.Tensor, canonical: torch.Tensor) -> None:
    """Fill `rows` [n, blocks, 8, inner, C] with the canonical rows [n, M, c] and zeros."""
    if rows.shape[1:4].numel() != canonical.shape[1] or rows.shape[4] != canonical.shape[2]:
        rows.zero_()
    for storage, piece in _pieces(rows, canonical):
        storage.copy_(piece)


def _read(rows: torch.Tensor, canonical: torch.Tensor) -> None:
    """The inverse of `_write`."""
    for storage, piece in _pieces(rows, canonical):
        piece.copy_(storage)


def _pieces(rows: torch.Tensor, canonical: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of equal shape, of the rows [n, blocks, 8, inner, C] and of canonical [n, M, c]: the whole blocks, and what there is of the last one."""
    _, _, outer, inner, _ = rows.shape
    blocks, rest = divmod(canonical.shape[1], outer * inner)
    rows = rows[..., : canonical.shape[2]]
    yield rows[:, :blocks], canonical[:, : blocks * outer * inner].unflatten(1, (blocks, outer, inner))
    if rest:
        yield rows[:, blocks, : rest // inner], canonical[:, blocks * outer * inner :].unflatten(1, (rest // inner, inner))


def _in_words(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same bytes in the widest integers that both can be viewed in: a GPU copies eight times as fast by eight bytes as by one."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(_is_aligned(tensor, dtype.itemsize) for tensor in (a, b)):
            return a.view(dtype), b.view(dtype)
    return a, b


def _is_aligned(tensor: torch.Tensor, size: int) -> bool:
    distances = (tensor.data_ptr() if tensor.device.type != "meta" else 0, tensor.storage_offset(), tensor.shape[-1], *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and all(distance % size == 0 for distance in distances)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
