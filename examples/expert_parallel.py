"""One MoE layer spread over ranks, each with tokens of its own; compared with the whole layer on one rank.

torchrun --nproc-per-node 2 examples/expert_parallel.py demo     # on GPUs with NCCL, else on the CPU with gloo
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

import halfbyte as hb


def main(model: str = "demo", layer: int = 0) -> None:
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")

    router = hb.load_router(model, layer, device)
    ep = hb.ExpertParallel(None, num_experts=len(router.weight))  # one object for all layers of a kind
    experts = hb.load_prepared(model, layer, device=device, experts=ep.local_range)  # only those of this rank are read
    moe = hb.MoE(router, experts, parallel=ep)

    torch.manual_seed(ep.rank)
    num_tokens = 5 + 3 * ep.rank  # every rank may have another number
    hidden = torch.randn(num_tokens, experts.hidden, dtype=torch.bfloat16).to(device)
    result = moe(hidden)

    whole = hb.fused_moe(hidden, hb.load_prepared(model, layer, device=device), *moe.route(hidden))
    error = (result.float() - whole.float()).norm() / whole.float().norm()
    print(f"rank {ep.rank} of {ep.num_ranks}: {experts.num_experts} experts, {num_tokens} tokens, {error:.1e} from the whole layer")
    assert error < 5e-3
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
