"""The nouns: `ExpertWeights`, the experts of one layer in canonical form; `Activation` between their matrices; `ExpertMap`, which are held here."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args

import torch

from halfbyte.arguments import as_device, check_floats, check_integers, check_name, check_numbers, check_tensors, check_type, same_bits
from halfbyte.errors import InputError
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.formats.block_format import as_format

ActivationKind = Literal["swiglu", "geglu", "geglu_tanh", "relu2"]
_KINDS: tuple[str, ...] = get_args(ActivationKind)
W13Order = Literal["gate_up", "up_gate", "interleaved"]
W13_ORDERS: tuple[str, ...] = get_args(W13Order)


@dataclass(frozen=True)
class Activation:
    """The function between the two expert matrices (computed by `kernels.reference.activation`).

    swiglu      (clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g) with g = min(gate, limit)
    geglu       gelu(gate) * up (exact gelu; "geglu_tanh": its tanh form)
    relu2       relu(x)^2, no gate: w13 has I rows, not 2I
    """

    kind: ActivationKind = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a kind that is none of these, or a number that is none."""
        check_name("activation", self.kind, _KINDS, "Activation")
        check_numbers("Activation", alpha=self.alpha, beta=self.beta)
        if self.limit is not None and not (isinstance(self.limit, Real) and self.limit >= 0):  # infinity too: such are in configurations
            raise InputError("limit does not fit", where="Activation", given=reprlib.repr(self.limit), needed="a number >= 0, or None")

    @property
    def gated(self) -> bool:
        return self.kind != "relu2"

    @property
    def halves(self) -> int:
        """Rows of w13 for each intermediate column: 2 (gate and up), or 1 without a gate."""
        return 2 if self.gated else 1


SWIGLU = Activation()
GPT_OSS_SWIGLU = Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0)
DEEPSEEK_V4_SWIGLU = Activation("swiglu", limit=10.0)
GEGLU = Activation("geglu")
GEGLU_TANH = Activation("geglu_tanh")
RELU2 = Activation("relu2")


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The experts of one layer; E experts, hidden size H, intermediate size I.

    Attributes:
        w13: [E, 2I, H], gate rows then up rows ([E, I, H] when the activation has no gate). A QuantTensor in scale layout "linear", whose
            NVFP4 global scale is [E, 2] (gate, up) for gated and [E] for plain experts; or a dense bf16/fp16/fp32 tensor.
        w2: [E, H, I], likewise; NVFP4 global scale [E].
        activation: what lies between the two, or its kind.
        w13_bias, w2_bias: [E, 2I] (same row order as w13) and [E, H], or None.
        w13_input_scale, w2_input_scale: fp32 decode multipliers of calibrated NVFP4 activations, one per expert of the *whole* layer:
            [E_global, 2] (gate, up; [E_global] when plain) and [E_global]; None where the checkpoint has none.
        first_expert, num_global_experts: which slice of the layer's experts this is (expert parallel); all of them by default.
    """

    w13: QuantTensor | torch.Tensor
    w2: QuantTensor | torch.Tensor
    activation: Activation = field(default_factory=Activation)  # SWIGLU; torch 2.11 compiles no constructor with an object as its default
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    w13_input_scale: torch.Tensor | None = None
    w2_input_scale: torch.Tensor | None = None
    first_expert: int = 0
    num_global_experts: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for matrices and vectors that do not belong together."""
        where = "ExpertWeights"
        if isinstance(self.activation, str):
            object.__setattr__(self, "activation", Activation(cast(ActivationKind, self.activation)))
        check_type(where, Activation, activation=self.activation)
        for name in _TENSOR_FIELDS:
            _check_field(name, getattr(self, name))
        if len(self.w13.shape) != 3 or len(self.w2.shape) != 3:
            given = f"w13 {tuple(self.w13.shape)}, w2 {tuple(self.w2.shape)}"
            raise InputError("expert weights are 3-D", where=where, given=given, needed="[E, 2I, H] and [E, H, I]")
        if self.num_global_experts is None:
            object.__setattr__(self, "num_global_experts", self.num_experts)
        check_integers(where, 0, first_expert=self.first_expert, num_global_experts=self.num_global_experts)
        halves = self.activation.halves
        experts, hidden, intermediate = self.w2.shape
        if tuple(self.w13.shape) != (experts, halves * intermediate, hidden):
            raise InputError(
                "w13 and w2 do not belong together",
                where=where,
                given=f"w13 {tuple(self.w13.shape)}, w2 {tuple(self.w2.shape)}, activation {self.activation.kind}",
                needed=f"w13 {(experts, halves * intermediate, hidden)}",
            )
        for name, bias, rows in (("w13_bias", self.w13_bias, halves * intermediate), ("w2_bias", self.w2_bias, hidden)):
            if bias is not None and tuple(bias.shape) != (experts, rows):
                raise InputError(f"{name} has the wrong shape", where=where, given=tuple(bias.shape), needed=(experts, rows))
        if _format_name(self.w13) != _format_name(self.w2):
            given = f"{_format_name(self.w13)} and {_format_name(self.w2)}"
            raise InputError("w13 and w2 are in different formats", where=where, given=given, needed="one format")

    @staticmethod
    def from_engine_tensors(
        tensors: Mapping[str, torch.Tensor | None],
        format: BlockFormat,
        activation: Activation | None = None,
        *,
        w13_order: W13Order = "gate_up",
        inverse_global_scales: bool = False,
        first_expert: int = 0,
        num_global_experts: int | None = None,
    ) -> ExpertWeights:
        """The experts of one layer from the tensors in which an engine holds them, sharing their memory.

        Args:
            tensors: by the names of `tensors`: "w13.codes" [E, 2I, H/2], "w13.scales" [E, 2I, H/block], "w2.codes", "w2.scales"; for NVFP4 also
                "w13.global_scale" [E, 2], [E, 1] or [E] and "w2.global_scale" [E] or [E, 1]; "w13_bias", "w2_bias", "w13_input_scale" and
                "w2_input_scale" where there are some. Parameters of any subclass are taken as plain tensors, and one byte per element in any dtype
                as what it is here. None stands for a tensor that is not there.
            format, activation, first_expert, num_global_experts: as in `ExpertWeights`.
            w13_order: how the rows of w13 lie: gate rows then up rows; "up_gate", the other way round; or "interleaved", gate and up in turns.
                Unless they lie as here already, the rows (biases and scales too) are moved *within the engine's tensors*, one expert at a time.
            inverse_global_scales: global and input scales are encode multipliers, as compressed-tensors stores them; the result has the reciprocals.

        Raises:
            InputError: a tensor is missing or unknown, or does not fit.

        >>> q13, q2 = halfbyte.quantize(torch.randn(4, 64, 32), halfbyte.NVFP4), halfbyte.quantize(torch.randn(4, 32, 32), halfbyte.NVFP4)
        >>> parameter = torch.nn.Parameter(q13.codes, requires_grad=False)  # as engines hold it
        >>> tensors = {"w13.codes": parameter, "w13.scales": q13.scales, "w13.global_scale": q13.global_scale.unsqueeze(1).expand(4, 2)}
        >>> tensors |= {"w2.codes": q2.codes, "w2.scales": q2.scales, "w2.global_scale": q2.global_scale}
        >>> w = halfbyte.ExpertWeights.from_engine_tensors(tensors, halfbyte.NVFP4)
        >>> w.intermediate, w.w13.codes.data_ptr() == parameter.data_ptr()
        (32, True)
        """
        where = "ExpertWeights.from_engine_tensors"
        activation = Activation() if activation is None else activation
        check_type(where, Mapping, tensors=tensors)
        check_tensors(where, **{name: tensor for name, tensor in tensors.items() if tensor is not None})
        check_type(where, Activation, activation=activation)
        check_name("w13_order", w13_order, W13_ORDERS, where)
        format = as_format(format, where)
        plain: dict[str, torch.Tensor] = {name: tensor.detach().as_subclass(torch.Tensor) for name, tensor in tensors.items() if tensor is not None}
        _check_engine_names(plain, format, where)
        if w13_order == "up_gate" and activation.gated:
            plain |= {name: plain[name].flip(1) for name in ("w13.global_scale", "w13_input_scale") if name in plain and plain[name].ndim == 2}
        for name in plain:
            if name.endswith(("global_scale", "input_scale")):
                scale = plain[name].float()
                scale = scale.squeeze(1) if scale.ndim == 2 and scale.shape[1] == 1 else scale
                plain[name] = scale.reciprocal() if inverse_global_scales else scale
        if activation.gated and "w13.global_scale" in plain and plain["w13.global_scale"].ndim == 1:
            plain["w13.global_scale"] = plain["w13.global_scale"].unsqueeze(1).expand(-1, 2).contiguous()

        def matrix(side: str) -> QuantTensor:
            codes, scales = plain[f"{side}.codes"].view(torch.uint8), plain[f"{side}.scales"]
            return QuantTensor(codes, scales.view(format.scale_dtype), plain.get(f"{side}.global_scale"), format)

        vectors = {name: plain.get(name) for name in _TENSOR_FIELDS[2:]}
        experts = ExpertWeights(matrix("w13"), matrix("w2"), activation, **vectors, first_expert=first_expert, num_global_experts=num_global_experts)
        if w13_order != "gate_up" and activation.gated:  # in the engine's memory, so after all that can be refused
            for name in ("w13.codes", "w13.scales", "w13_bias"):
                if name in plain:
                    _gate_rows_first(plain[name], w13_order)
        return experts

    def __repr__(self) -> str:
        return "\n".join(["ExpertWeights(", *(f"  {line}," for line in self._facts()), ")"])

    def _facts(self) -> Iterator[str]:
        held = f"{self.first_expert} .. {self.first_expert + self.num_experts - 1} of {self.num_global_experts}"
        yield f"{self.num_experts} experts ({held}), hidden {self.hidden}, intermediate {self.intermediate}, {self.activation}"
        for name in _TENSOR_FIELDS:
            value = getattr(self, name)
            if value is not None:
                yield f"{name}: {value!r}" if isinstance(value, QuantTensor) else f"{name}: {value.dtype} {list(value.shape)}, {value.device}"

    def __eq__(self, other: object) -> bool:
        """Whether formats, sizes, activation, place in the layer and every bit are the same."""
        if not isinstance(other, ExpertWeights):
            return NotImplemented

        def tags(w: ExpertWeights) -> tuple[object, ...]:
            return w.format, w.activation, w.first_expert, w.num_global_experts

        return tags(self) == tags(other) and same_bits(self.tensors, other.tensors)

    __hash__ = None  # type: ignore[assignment]  # tensors can change

    @property
    def num_experts(self) -> int:
        """Experts held here (E)."""
        return self.w2.shape[0]

    @property
    def hidden(self) -> int:
        return self.w2.shape[1]

    @property
    def intermediate(self) -> int:
        return self.w2.shape[2]

    @property
    def format(self) -> BlockFormat | None:
        """NVFP4, MXFP4, or None for dense weights."""
        return self.w13.format if isinstance(self.w13, QuantTensor) else None

    @property
    def device(self) -> torch.device:
        return self.w2.device

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes + sum(bias.nbytes for bias in (self.w13_bias, self.w2_bias) if bias is not None)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name: "w13.codes", "w13.scales", "w13.global_scale", ... (or "w13", dense), "w13_bias", ..."""
        result: dict[str, torch.Tensor] = {}
        for name, value in ((name, getattr(self, name)) for name in _TENSOR_FIELDS):
            if isinstance(value, QuantTensor):
                result |= {f"{name}.{part}": tensor for part, tensor in value.tensors.items()}
            elif value is not None:
                result[name] = value
        return result

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """The same experts with other storage; names as in `tensors`."""

        def renewed(name: str, value: QuantTensor | torch.Tensor | None) -> QuantTensor | torch.Tensor | None:
            if isinstance(value, QuantTensor):
                return replace(
                    value, codes=tensors[f"{name}.codes"], scales=tensors[f"{name}.scales"], global_scale=tensors.get(f"{name}.global_scale")
                )
            return tensors.get(name)

        fields: dict[str, Any] = {name: renewed(name, getattr(self, name)) for name in _TENSOR_FIELDS}
        return replace(self, **fields)

    def __getitem__(self, experts: slice) -> ExpertWeights:
        """The experts of a contiguous slice, sharing storage; input scales go on to cover all experts of the layer."""
        if not isinstance(experts, slice):
            raise InputError("experts are taken in slices", where="ExpertWeights", given=repr(experts), needed="a slice, w[2:4]")
        first, last, step = experts.indices(self.num_experts)
        if step != 1:
            raise InputError("experts are taken in contiguous slices", given=experts, needed="a step of 1")
        parts = {name: tensor if name.endswith("input_scale") else tensor[first:last] for name, tensor in self.tensors.items()}
        return replace(self.with_tensors(parts), first_expert=self.first_expert + first)

    def to(self, device: torch.device | str) -> ExpertWeights:
        """Copy every tensor to `device`; UnsupportedError where there is no such device."""
        place = as_device(device, "ExpertWeights.to")
        return self.with_tensors({name: tensor.to(place) for name, tensor in self.tensors.items()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> ExpertWeights:
        """Return the same experts dense in `dtype`."""
        return replace(self, w13=_dense(self.w13, dtype), w2=_dense(self.w2, dtype))


@dataclass(frozen=True)
class ExpertMap:
    """Which experts of a layer are held here: from the ids that routing gives to local ones, 0 .. E - 1, or none.

    A contiguous slice costs nothing; any other placement is looked up, a few small kernels per call. An expert of which several ranks hold a copy
    takes its tokens in turn: the token at index t goes to copy t % copies, so every rank must see the same tokens in the same order.

    Attributes:
        first: the id of the first expert held here, where they are a contiguous slice.
        local_of_copy: int32 [num_global, max copies]: the local expert that is this copy, -1 where it is held elsewhere; None for a slice.
        copies: int64 [num_global]: how many copies of each expert there are; None for a slice.
    """

    first: int = 0
    local_of_copy: torch.Tensor | None = None
    copies: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a first expert that is none, and for one of the two tables without the other."""
        check_integers("ExpertMap", 0, first=self.first)
        tables = {name: value for name, value in (("local_of_copy", self.local_of_copy), ("copies", self.copies)) if value is not None}
        check_tensors("ExpertMap", **tables)
        if len(tables) == 1:
            raise InputError("one table without the other", where="ExpertMap", given=" ".join(tables), needed="local_of_copy and copies, or neither")

    @staticmethod
    def placed(ranks: Sequence[Sequence[int]], rank: int, num_global: int, device: torch.device | str = "cpu") -> ExpertMap:
        """The map of `rank` where rank r holds the experts `ranks[r]`, in this order; an expert may be named several times.

        Raises:
            InputError: an id that is not 0 .. num_global - 1, an expert that no rank holds, no such rank, or no lists of ids.
            UnsupportedError: there is no such device.

        >>> ExpertMap.placed([[0, 2], [1, 3]], rank=1, num_global=4).local(torch.tensor([[3, 0]])).tolist()
        [[1, -1]]
        >>> busy = [ExpertMap.placed([[0, 1], [1]], rank, num_global=2) for rank in range(2)]  # two copies of expert 1
        >>> [m.local(torch.tensor([[1], [1], [1]])).flatten().tolist() for m in busy]
        [[1, -1, 1], [-1, 0, -1]]
        """
        ranks = id_lists(ranks, "ExpertMap")
        check_integers("ExpertMap", 0, rank=rank)
        check_integers("ExpertMap", 1, num_global=num_global)
        device = as_device(device, "ExpertMap")
        if rank >= len(ranks):
            raise InputError("no such rank", where="ExpertMap", given=rank, needed=f"0 .. {len(ranks) - 1}")
        named = {expert for held in ranks for expert in held}
        missing = list(itertools.islice((expert for expert in range(num_global) if expert not in named), 8))
        if missing:
            raise InputError("experts that no rank holds", where="ExpertMap", given=missing, needed="every expert on one rank at least")
        places: list[list[int]] = [[] for _ in range(num_global)]  # of every expert: its copies, as local ids here or -1
        for other, held in enumerate(ranks):
            for local, expert in enumerate(held):
                if not 0 <= expert < num_global:
                    raise InputError("no such expert", where="ExpertMap", given=f"{expert} on rank {other}", needed=f"0 .. {num_global - 1}")
                places[expert].append(local if other == rank else -1)
        most = max(map(len, places))
        table = torch.tensor([found + [-1] * (most - len(found)) for found in places], dtype=torch.int32, device=device)
        return ExpertMap(0, table, torch.tensor([len(found) for found in places], dtype=torch.int64, device=device))

    @property
    def is_slice(self) -> bool:
        return self.local_of_copy is None

    def local(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """The local expert of every slot of topk_ids int [T, k], -1 where it is not held here or the id names no expert: int [T, k]."""
        if self.local_of_copy is None or self.copies is None:
            return topk_ids - self.first
        is_expert = (topk_ids >= 0) & (topk_ids < len(self.copies))
        expert = torch.where(is_expert, topk_ids, 0).long()
        copy = torch.arange(len(topk_ids), dtype=torch.int64, device=topk_ids.device).unsqueeze(1) % self.copies[expert]
        return torch.where(is_expert, self.local_of_copy[expert, copy], -1)


_TENSOR_FIELDS = ("w13", "w2", "w13_bias", "w2_bias", "w13_input_scale", "w2_input_scale")


def id_lists(placement: object, where: str) -> list[list[int]]:
    """Which experts each rank holds, as plain lists.

    Raises:
        InputError: no lists of integers.
    """
    if isinstance(placement, Sequence) and all(isinstance(held, Iterable) and not isinstance(held, str) for held in placement):
        lists = [list(held) for held in placement]
        if all(isinstance(expert, Integral) for held in lists for expert in held):
            return lists
    raise InputError("placement does not fit", where=where, given=reprlib.repr(placement), needed="a list of expert ids per rank")


def _check_field(name: str, value: Any) -> None:
    """Raise InputError for a field of `ExpertWeights` that holds something else than floats."""
    if isinstance(value, QuantTensor) or (value is None and name not in ("w13", "w2")):
        return
    check_tensors("ExpertWeights", **{name: value})
    check_floats("ExpertWeights", **{name: value.dtype})


def _check_engine_names(tensors: Mapping[str, torch.Tensor], format: BlockFormat, where: str) -> None:
    needed = {f"{side}.{part}" for side in ("w13", "w2") for part in ("codes", "scales", *(("global_scale",) if format.has_global_scale else ()))}
    for problem, names in (("tensors are missing", needed - tensors.keys()), ("unknown tensors", tensors.keys() - needed - {*_TENSOR_FIELDS[2:]})):
        if names:
            raise InputError(problem, where=where, given=", ".join(sorted(names)), needed=", ".join(sorted(needed)))


def _gate_rows_first(tensor: torch.Tensor, order: W13Order) -> None:
    """Bring the rows, dimension 1, of each expert into the order gate then up, through a copy of one expert."""
    for expert in tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor:  # not every device can index fp8
        half = len(expert) // 2
        gate, up = (expert[half:], expert[:half]) if order == "up_gate" else (expert[::2], expert[1::2])
        expert.copy_(torch.cat((gate, up)))


def _dense(weight: QuantTensor | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize(dtype) if isinstance(weight, QuantTensor) else weight.to(dtype)


def _format_name(weight: QuantTensor | torch.Tensor) -> str:
    return repr(weight.format) if isinstance(weight, QuantTensor) else str(weight.dtype)
