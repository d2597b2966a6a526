"""What the bits mean: elements, block formats, scale layouts, and the quantiser that defines them. Pure torch, any device."""

from halfbyte.formats.block_format import (
    FORMATS,
    MXFP4,
    NVFP4,
    BlockFormat,
    decode_scale_from_encode,
    encode_scale_from_decode,
    nvfp4_decode_scale,
)
from halfbyte.formats.fp8_tensor import Fp8Tensor
from halfbyte.formats.quant_tensor import QuantTensor
from halfbyte.formats.quantizer import count_nonfinite, matrix_amax, quantize
from halfbyte.formats.scale_layout import swizzle_scales, unswizzle_scales

__all__ = [
    "FORMATS",
    "MXFP4",
    "NVFP4",
    "BlockFormat",
    "Fp8Tensor",
    "QuantTensor",
    "count_nonfinite",
    "decode_scale_from_encode",
    "encode_scale_from_decode",
    "matrix_amax",
    "nvfp4_decode_scale",
    "quantize",
    "swizzle_scales",
    "unswizzle_scales",
]
