"""halfbyte: FP4 (NVFP4, MXFP4) Mixture-of-Experts models, fast, on the GPUs people have."""

from halfbyte.formats import MXFP4, NVFP4, BlockFormat, QuantTensor, quantize, swizzle_scales, unswizzle_scales

__version__ = "0.1.0"
__all__ = ["MXFP4", "NVFP4", "BlockFormat", "QuantTensor", "quantize", "swizzle_scales", "unswizzle_scales"]
