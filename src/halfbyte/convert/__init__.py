"""Whole-model conversion: read a checkpoint matrix by matrix, quantise, write a new one."""

from halfbyte.convert.quantize_model import QuantizeOptions, quantize_model
from halfbyte.convert.report import QuantizeReport

__all__ = ["QuantizeOptions", "QuantizeReport", "quantize_model"]
