"""A decode step of an engine of one's own: every MoE layer of a checkpoint, one workspace, a CUDA graph per batch size.

python examples/engine_step.py ./demo-NVFP4     # as quantise_model.py wrote it; or org/name. Dense experts run in plain torch, which no graph takes
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import halfbyte as hb

BATCH_SIZES = (1, 4)


def main(model: str = "demo-NVFP4") -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = [hb.MoE(hb.load_router(model, number, device), experts) for number, experts in hb.iter_prepared(model, device=device)]
    for layer in layers:
        layer.warm_up(max_tokens=max(BATCH_SIZES))  # before graphs are captured: nothing compiles later, and nothing twice

    # The layers run one after another, so one buffer serves them all.
    nbytes = max(hb.workspace_nbytes(layer.experts, max(BATCH_SIZES), layer.top_k) for layer in layers)
    workspace = hb.Workspace(torch.empty(nbytes, dtype=torch.uint8, device=device))

    def step(hidden: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            ids, weights = layer.route(hidden)  # as the model's family does it
            hidden = hidden + hb.fused_moe(hidden, layer.experts, ids, weights, workspace=workspace)
        return hidden

    width = layers[0].experts.hidden
    for batch in BATCH_SIZES:
        tokens = torch.randn(batch, width, device=device, dtype=torch.bfloat16)
        run = captured(step, tokens) if device == "cuda" else step
        result = run(tokens)
        assert torch.equal(result, step(tokens)) and result.isfinite().all()
        print(f"{batch} tokens through {len(layers)} layers: {'replayed a graph' if device == 'cuda' else 'ran'}, result {tuple(result.shape)}")


def captured(step: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`step` as a CUDA graph: inputs are copied to where the graph reads them, the result is where it writes it."""
    buffer, graph = example.clone(), torch.cuda.CUDAGraph()
    step(buffer)
    with torch.cuda.graph(graph):
        result = step(buffer)

    def replay(tokens: torch.Tensor) -> torch.Tensor:
        buffer.copy_(tokens)
        graph.replay()
        return result.clone()

    return replay


if __name__ == "__main__":
    main(*sys.argv[1:])
