"""What rounding on the way costs: text perplexity of the embedded model in NVFP4, its experts spread over two ranks that this process plays.

    python benchmarks/dispatch_accuracy.py [--windows 16]

Hidden states go through the wire of each payload, every rank runs half of the experts, and the partial sums of the other rank through the combine's
format: what `ExpertParallel` does, without processes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import halfbyte as hb
from halfbyte.checkpoint.source import demo_model_dir
from halfbyte.convert.quantize_model import QuantizeOptions, quantize_model
from halfbyte.distributed.placement import contiguous
from halfbyte.distributed.wire import Wire
from halfbyte.eval.data import load_documents
from halfbyte.eval.evaluate import evaluate
from halfbyte.eval.metrics import text_passages
from halfbyte.integrations.transformers import load, modules

RANKS = 2
WAYS = (("bf16", "bf16"), ("fp8", "bf16"), ("fp4", "bf16"), ("bf16", "fp8"), ("fp8", "fp8"), ("fp4", "fp8"))


def spread_over_ranks(payload: Any, combine: str) -> Any:
    """A stand-in for `fused_moe`: token t belongs to rank t % RANKS."""

    def layer(hidden: torch.Tensor, experts: hb.PreparedExperts, ids: torch.Tensor, weights: torch.Tensor, **options: Any) -> torch.Tensor:
        wire = Wire(payload, hidden.shape[1], hidden.dtype)
        arrived = wire.decode(wire.encode(hidden))
        owner = torch.arange(len(hidden), device=hidden.device).unsqueeze(1) % RANKS
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for rank, held in enumerate(contiguous(experts.num_experts, RANKS)):
            here = torch.where((ids >= held[0]) & (ids <= held[-1]), ids, -1)
            partial = hb.fused_moe(arrived, experts, here, weights, **options).float()
            if combine == "fp8":
                partial = torch.where(owner == rank, partial, hb.quantize_fp8(partial.bfloat16()).dequantize())
            total += partial
        return total.to(hidden.dtype)

    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens of text")
    windows = parser.parse_args().windows
    with tempfile.TemporaryDirectory() as folder:
        quantize_model(demo_model_dir(), Path(folder) / "nvfp4", QuantizeOptions(format="nvfp4"))
        model, tokenizer = load(Path(folder) / "nvfp4")
        reference, _ = load(demo_model_dir())
        passages = text_passages(tokenizer, load_documents(demo_model_dir() / "heldout.txt.xz"), limit=windows)
        print("| dispatch | combine | perplexity | KL to bf16 |\n|---|---|---|---|", flush=True)
        whole = modules.fused_moe
        for payload, combine in (("one rank", ""), *WAYS):
            modules.fused_moe = whole if not combine else spread_over_ranks(payload, combine)
            report = evaluate(model, tokenizer, passages=passages, reference=reference)
            print(f"| {payload} | {combine or '-'} | {report.perplexity:.3f} | {report.kl:.4f} |", flush=True)


if __name__ == "__main__":
    main()
