"""Reinforcement learning: a server generates with FP4 experts, a trainer changes the weights, the server takes them over in place.

The server's CUDA graph is captured once. `update_` writes the new weights to the same addresses, so the graph goes on with them.

python examples/rl_refit.py
"""

from __future__ import annotations

import torch

import halfbyte as hb

NUM_EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 8, 256, 128, 2, 16


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    w13 = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=device) * HIDDEN**-0.5  # the trainer's master weights
    w2 = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, device=device) * INTERMEDIATE**-0.5

    served = hb.prepare(quantised(w13, w2))
    hb.warm_up(served, TOP_K, max_tokens=TOKENS)
    hidden = torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)
    routing = hb.route(torch.randn(TOKENS, NUM_EXPERTS, device=device), TOP_K)
    out = torch.empty_like(hidden)

    def call() -> None:
        hb.fused_moe(hidden, served, routing.ids, routing.weights, out=out)

    call()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    serve = graph.replay if device == "cuda" else call

    for refit in range(3):
        before = out.clone()
        w13.add_(0.05 * torch.randn_like(w13) * w13.std())  # a step of the trainer
        w2.add_(0.05 * torch.randn_like(w2) * w2.std())
        served.update_(quantised(w13, w2))
        serve()
        fresh = hb.fused_moe(hidden, hb.prepare(quantised(w13, w2)), routing.ids, routing.weights)
        assert torch.equal(out, fresh), "the server has exactly the new weights"
        moved = (out - before).norm() / before.norm()
        print(f"refit {refit}: the results moved by {moved:.1%}, and are those of the new weights bit for bit")


def quantised(w13: torch.Tensor, w2: torch.Tensor) -> hb.ExpertWeights:
    return hb.ExpertWeights(hb.quantize(w13, hb.MXFP4), hb.quantize(w2, hb.MXFP4))


if __name__ == "__main__":
    main()
