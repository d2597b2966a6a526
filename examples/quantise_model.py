"""Quantise a model to NVFP4, look at what came out, and read one layer back.

python examples/quantise_model.py demo ./demo-NVFP4      # the embedded model; or a directory, or org/name
"""

from __future__ import annotations

import sys
from pathlib import Path

import halfbyte as hb
from halfbyte.convert import QuantizeOptions, quantize_model


def main(source: str = "demo", destination: str = "demo-NVFP4") -> None:
    report = quantize_model(source, Path(destination), QuantizeOptions(format="nvfp4"))
    print(f"{report.source_bytes / 1e6:.1f} MB became {report.output_bytes / 1e6:.1f} MB")

    exact, quantised = hb.load_experts(source, layer=0), hb.load_experts(destination, layer=0)
    original, decoded = exact.w13.float(), quantised.w13.dequantize()
    error = (decoded - original).norm() / original.norm()
    bits = 8 * quantised.w13.nbytes / original.numel()
    print(f"layer 0, w13 {tuple(original.shape)}: {bits:.2f} bits per weight, off by {error:.1%} of its norm")
    assert error < 0.12


if __name__ == "__main__":
    main(*sys.argv[1:])
