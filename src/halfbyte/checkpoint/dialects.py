"""How each quantiser names and encodes the tensors of a matrix [N, K]. No other file knows these suffixes.

| dialect | codes | block scales | global scale | input scale |
|---|---|---|---|---|
| modelopt | .weight u8 [N, K/2] | .weight_scale e4m3 [N, K/16] | .weight_scale_2 [] | .input_scale [] |
| nvfp4-pack-quantized | .weight_packed u8 [N, K/2] | .weight_scale e4m3 [N, K/16] | .weight_global_scale [1] | .input_global_scale [1] |
| mxfp4-pack-quantized | .weight_packed u8 [N, K/2] | .weight_scale e8m0 [N, K/32] | | |
| quark | .weight u8 [N, K/2] | .weight_scale e8m0 [N, K/32] | | |
| gpt-oss | _blocks u8 [E, N, K/32, 16] | _scales e8m0 [E, N, K/32] | | |
| modelopt stacked | no suffix: u8 [E, N, K/2] or [E, K/2, N] | _weight_scale e4m3 | _weight_scale_2 [] or [E] | _input_scale [] or [E] |
| nvfp4-pack-quantized stacked | _packed u8 [E, N, K/2] | _scale e4m3 | _global_scale [E] | _input_global_scale [E] |
| mxfp4-pack-quantized stacked | _packed u8 [E, N, K/2] | _scale e8m0 | | |
| deepseek-v4 | .weight int8 [N, K/2] | .scale or .weight_scale_inv, e8m0 or a power of two in fp32 [N, K/32] | | |
| fp8-block | .weight e4m3 [N, K] | .weight_scale_inv fp32 or bf16 [N/128, K/128], rounded up | | |
| dense | .weight bf16, fp16, fp32 [N, K] | | | |
| dense stacked | no suffix: bf16, fp16, fp32 [E, N, K] or [E, K, N] | | | |

Scales are row-major. Global and input scales are fp32, decode multipliers for modelopt and encode multipliers (1 / decode) for compressed-tensors; an
input scale is there only where activations were calibrated. gpt-oss and stacked ones hold all experts of a layer in one tensor, biases in _bias.
Stacked experts whose names end in .weight (`block_sparse_moe.input_linear.weight`) have the suffixes of single matrices.

Sources: ModelOpt `export/convert_hf_config.py`, compressed-tensors `quantization/quant_scheme.py`, the published files of gpt-oss, DeepSeek-V3 and
DeepSeek-V4.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

from halfbyte.errors import InputError
from halfbyte.formats import MXFP4, NVFP4, BlockFormat, QuantTensor, decode_scale_from_encode, encode_scale_from_decode

CODE_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
_E4M3 = (torch.float8_e4m3fn, torch.uint8)
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Dialect:
    """One way to store a matrix: suffixes behind the name of its module (of the stacked matrix, where `stacked`); "" where there is no such tensor.

    Attributes:
        name: what halfbyte calls it; for compressed-tensors the format of the checkpoint's configuration.
        format: of the codes; None for weights that are not FP4.
        codes: the packed elements, or the weight itself.
        scales: block scales; the first is the usual name. scale_dtypes: what they are stored in.
        global_scale, input_scale: scalars of the matrix and of its calibrated input.
        bias: of the matrix.
        input_factor: what NVFP4_AWQ multiplies the input by, channel for channel; never read, refused by name.
        dense: the dense weight that the codes stand for.
        encode: the scalars are stored as encode multipliers, 1 / decode.
        stacked: one tensor holds the matrices of all experts.
        blocked: the codes of a block have a dimension of their own.
    """

    name: str
    format: BlockFormat | None = None
    codes: str = ".weight"
    scales: tuple[str, ...] = ()
    scale_dtypes: tuple[torch.dtype, ...] = ()
    global_scale: str = ""
    input_scale: str = ""
    bias: str = ".bias"
    input_factor: str = ""
    dense: str = ".weight"
    encode: bool = False
    stacked: bool = False
    blocked: bool = False

    def codes_shape(self, columns: int) -> tuple[int, ...]:
        """What follows the rows in the shape of the codes of `columns` elements per row.

        >>> GPT_OSS.codes_shape(64), MODELOPT.codes_shape(64), DENSE.codes_shape(64)
        ((2, 16), (32,), (64,))
        """
        if self.format is None:
            return (columns,)
        return (columns // self.format.block, self.format.block // 2) if self.blocked else (columns // 2,)

    def columns(self, *codes_shape: int) -> int:
        """The elements of a row whose codes have this shape.

        >>> GPT_OSS.columns(2, 16), MODELOPT.columns(32), DENSE.columns(64)
        (64, 64, 64)
        """
        return math.prod(codes_shape) * (1 if self.format is None else 2)

    def decode_scalar(self, stored: torch.Tensor) -> torch.Tensor:
        """The fp32 decode multiplier that a stored scalar means."""
        return decode_scale_from_encode(stored) if self.encode else stored.float()

    def storable_global_scale(self, decode_scale: torch.Tensor) -> torch.Tensor:
        """The fp32 decode multiplier nearest to `decode_scale` that can be stored exactly.

        1/(1/s) != s for one fp32 in six; but 1/(1/s) itself comes back exactly (checked for every mantissa in tests/checkpoint/test_dialects.py),
        so a weight quantised with it reads back bit for bit.
        """
        return decode_scale_from_encode(encode_scale_from_decode(decode_scale)) if self.encode else decode_scale

    def pack(self, module: str, q: QuantTensor, input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Name the tensors of one quantised module as this dialect stores them.

        Args:
            module: e.g. "model.layers.0.mlp.experts.3.gate_proj".
            q: [N, K], stacked dialects [E, N, K], in scale layout "linear" with one global scale per matrix (NVFP4) or none (MXFP4).
            input_scale: fp32 decode multiplier [] of calibrated NVFP4 activations; None for weight-only.

        Raises:
            InputError: the dialect does not hold such a matrix, or no input scale with it.

        >>> sorted(MODELOPT.pack("m", halfbyte.quantize(torch.ones(4, 32), halfbyte.NVFP4)))
        ['m.weight', 'm.weight_scale', 'm.weight_scale_2']
        """
        if q.format is not self.format:
            raise InputError(f"{self.name} does not hold {q.format!r} matrices", where=module, given=q.format, needed=self.format)
        dimensions = 3 if self.stacked else 2
        if q.scale_layout != "linear" or len(q.shape) != dimensions:
            needed = f"{'[E, N, K]' if self.stacked else '[N, K]'}, linear"
            raise InputError(f"{self.name} holds other matrices", where=module, given=f"{tuple(q.shape)}, {q.scale_layout}", needed=needed)
        codes = q.codes.unflatten(-1, self.codes_shape(q.shape[-1])) if self.blocked else q.codes
        tensors = {module + self.codes: codes, module + self.scales[0]: q.scales}
        for suffix, scalar in ((self.global_scale, q.global_scale), (self.input_scale, input_scale)):
            if scalar is None:
                continue
            if not suffix:
                raise InputError(f"{self.name} has no input scale", where=module, given=scalar, needed=None)
            # A copy: gate and up may come with one tensor, and safetensors refuses tensors that share memory.
            tensors[module + suffix] = encode_scale_from_decode(scalar).reshape(1) if self.encode else scalar.clone()
        return tensors


def _stacked(single: Dialect, *, dropped: str = "") -> Dialect:
    """The same for all experts of a layer in one tensor that is a Parameter of its own: no ".weight", and "_" where a module has ".".

    `dropped`: a word that goes with it in the names of the other tensors.
    """

    def renamed(suffix: str) -> str:
        return suffix.removeprefix(dropped).replace(".", "_")

    return replace(
        single,
        name=f"{single.name} stacked",
        codes="" if single.codes == ".weight" else renamed(single.codes),
        scales=tuple(map(renamed, single.scales)),
        global_scale=renamed(single.global_scale),
        input_scale=renamed(single.input_scale),
        bias=renamed(single.bias),
        input_factor=renamed(single.input_factor),
        dense="",
        stacked=True,
    )


def fp8_scales_of(weight: str) -> str:
    """The name of the fp8-block scales that belong to the tensor `weight`, whatever that is called."""
    return f"{weight}_scale_inv"


MODELOPT = Dialect("modelopt", NVFP4, ".weight", (".weight_scale",), _E4M3, ".weight_scale_2", ".input_scale", input_factor=".pre_quant_scale")
NVFP4_PACK = Dialect(
    "nvfp4-pack-quantized", NVFP4, ".weight_packed", (".weight_scale",), _E4M3, ".weight_global_scale", ".input_global_scale", encode=True
)
MXFP4_PACK = Dialect("mxfp4-pack-quantized", MXFP4, ".weight_packed", (".weight_scale",), (*_E8M0, torch.float32))
QUARK = Dialect("quark", MXFP4, ".weight", (".weight_scale",), _E8M0)
GPT_OSS = Dialect("gpt-oss", MXFP4, "_blocks", ("_scales",), _E8M0, bias="_bias", dense="", stacked=True, blocked=True)
DEEPSEEK_V4 = Dialect("deepseek-v4", MXFP4, ".weight", (".scale", fp8_scales_of(".weight")), (*_E8M0, torch.float32))
# e4m3 matrices beside FP4 ones: one scale, one per row, or one for 128 x 128 elements.
FP8 = Dialect("fp8", scales=(".weight_scale", fp8_scales_of(".weight"), ".scale"))
FP8_STACKED = Dialect("fp8 stacked", codes="", scales=("_weight_scale", "_scale", fp8_scales_of("")), dense="", stacked=True)
FP8_BLOCK = Dialect("fp8-block", scales=(fp8_scales_of(".weight"),), scale_dtypes=(torch.float32, torch.bfloat16))
DENSE = Dialect("dense")
STACKED_MODELOPT = _stacked(MODELOPT)
STACKED_NVFP4_PACK = _stacked(NVFP4_PACK, dropped=".weight")
STACKED_MXFP4_PACK = _stacked(MXFP4_PACK, dropped=".weight")
STACKED_DENSE = _stacked(DENSE)
STACKED_FORM = {MODELOPT: STACKED_MODELOPT, NVFP4_PACK: STACKED_NVFP4_PACK, MXFP4_PACK: STACKED_MXFP4_PACK, DENSE: STACKED_DENSE}
DIALECTS = (MODELOPT, NVFP4_PACK, MXFP4_PACK, QUARK, GPT_OSS, DEEPSEEK_V4, FP8_BLOCK, DENSE, *STACKED_FORM.values())

_OF_ACTIVATIONS = re.compile(r"(^|[._])(input_scale|input_global_scale|input_activation_scale|output_scale|[kqv]_scale|kv_scale|prob_output_scale)$")
_OF_WEIGHTS = re.compile(r"(_scale|_scale_2|_scale_inv|_scales|_packed|_blocks|zero_point|[._]bias)$|\.scale$")

OutputName = Literal["modelopt", "compressed-tensors", "gpt-oss"]
OUTPUTS: dict[OutputName, tuple[Dialect, ...]] = {
    "modelopt": (MODELOPT,),
    "compressed-tensors": (NVFP4_PACK, MXFP4_PACK),
    "gpt-oss": (GPT_OSS, STACKED_MODELOPT),
}

_SCALES = tuple(suffix for dialect in DIALECTS for suffix in (*dialect.scales, dialect.global_scale, dialect.input_scale) if suffix)
_CODES = tuple(dialect.codes for dialect in DIALECTS if dialect.codes)
MATRIX_SUFFIXES = frozenset((*_CODES, *_SCALES))
# Tensors that only a quantised module has, here or (zero points) in integer formats, which halfbyte does not read.
QUANTIZED_ONLY = (*dict.fromkeys(suffix for suffix in _SCALES if suffix.startswith(".weight_")), ".weight_zero_point")


def output_dialect(output: str, format: BlockFormat) -> Dialect:
    """The dialect in which checkpoints of kind `output` are written in `format`.

    Raises:
        InputError: no such output, or it cannot hold `format`.

    >>> output_dialect("compressed-tensors", MXFP4).name
    'mxfp4-pack-quantized'
    """
    dialects = next((dialects for name, dialects in OUTPUTS.items() if name == output), None)
    if dialects is None:
        raise InputError("unknown output", given=repr(output), needed=" or ".join(OUTPUTS))
    found = next((dialect for dialect in dialects if dialect.format is format), None)
    if found is None:
        raise InputError(
            f"{output} checkpoints do not exist in {format!r}",
            given=f"output {output}, format {format.name}",
            needed=" or ".join(f"{name} {dialect.format.name}" for name, known in OUTPUTS.items() for dialect in known if dialect.format),
            next_step="choose compressed-tensors for mxfp4",
        )
    return found


def scales_activations(tensor: str) -> bool:
    """Whether a tensor, by its name, scales activations or the KV cache, which no reader of weights needs.

    >>> scales_activations("attn.k_proj.k_scale"), scales_activations("mlp.up_proj.weight_scale")
    (True, False)
    """
    return _OF_ACTIVATIONS.search(tensor) is not None


def belongs_to_quantized(tensor: str) -> bool:
    """Whether a tensor, by its name, is a part of a quantised layer or a bias, so that leaving it out changes the model.

    >>> belongs_to_quantized("mlp.up_proj.pre_quant_scale"), belongs_to_quantized("mlp.up_proj.weight")
    (True, False)
    """
    return _OF_WEIGHTS.search(tensor) is not None or is_scale(tensor)


def is_scale(tensor: str) -> bool:
    """Whether a tensor holds scales, by its name: those of any dialect, and other scales, such as k_scale of a KV cache.

    >>> is_scale("experts.gate_up_proj_scales"), is_scale("attn.k_scale"), is_scale("experts.0.w1.weight")
    (True, True, False)
    """
    return tensor.endswith(("scale", *_SCALES))


def may_be_codes(tensor: str) -> bool:
    """Whether a tensor of integers holds packed codes, by its name.

    >>> may_be_codes("experts.0.w1.weight_packed"), may_be_codes("gate.tid2eid")
    (True, False)
    """
    return tensor.endswith((*_CODES, "_proj"))  # stacked codes have no suffix behind the name of their matrix
