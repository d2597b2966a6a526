"""`set_parallel`: a loaded model whose packed experts are spread over the ranks of an `ExpertParallel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.arguments import check_type
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.integrations.packing import is_attached, restore_canonical
from halfbyte.integrations.transformers.stored import INPUT_SCALE
from halfbyte.moe.parallel import ExpertParallel


def packed_modules(model: nn.Module) -> list[Any]:
    """The modules of `model` that hold packed experts."""
    return [module for module in model.modules() if is_attached(module)]


def num_experts(model: nn.Module) -> int | None:
    """How many packed experts a layer of `model` has; None where there are none.

    Raises:
        UnsupportedError: layers have different numbers of them.
    """
    counts = {module.halfbyte.host.weights(module).num_global_experts for module in packed_modules(model)}
    if len(counts) > 1:
        raise UnsupportedError("layers have different numbers of experts", where="set_parallel", given=sorted(counts), needed="one number")
    return counts.pop() if counts else None


def set_parallel(model: nn.Module, parallel: ExpertParallel) -> None:
    """Leave this rank its own experts in every packed layer of `model`, which tokens of all ranks then reach. Every rank calls it.

    From then on the ranks call the model equally often, each with a batch of its own of any size. The model is loaded whole before: load it on the
    CPU, call this, then move it to the GPU, which so never holds more than its share. It cannot be saved, nor traced by torch.compile.

    Raises:
        InputError: there are no packed experts, another number of them than `parallel` says, or they are spread already.
        UnsupportedError: a parameter of the experts is not one per expert.

    >>> from pathlib import Path
    >>> import torch.distributed as dist
    >>> from halfbyte.integrations.transformers import load, set_parallel
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> model, _ = load(Path(halfbyte.__file__).parent / "demo_model")
    >>> set_parallel(model, halfbyte.ExpertParallel(None, num_experts=16))
    Traceback (most recent call last):
    halfbyte.errors.InputError: set_parallel: the model has no packed experts (needed FP4 experts). Run: halfbyte quantize SRC DST
    >>> dist.destroy_process_group()
    """
    where = "set_parallel"
    check_type(where, nn.Module, model=model)
    check_type(where, ExpertParallel, parallel=parallel)
    found = num_experts(model)
    if found is None:
        raise InputError("the model has no packed experts", where=where, needed="FP4 experts", next_step="run: halfbyte quantize SRC DST")
    if found != parallel.num_experts:
        raise InputError("parallel does not fit the model", where=where, given=f"{parallel.num_experts} experts", needed=f"{found}")
    modules = packed_modules(model)
    if any(module.halfbyte.parallel is not None for module in modules):
        raise InputError("the experts are spread already", where=where, next_step="load the model again")
    for module in modules:
        restore_canonical(module)
        for name, parameter in module.named_parameters(recurse=False):
            if len(parameter) != found:
                given = f"{name} {tuple(parameter.shape)}"
                raise UnsupportedError("this parameter is not one per expert", where=type(module).__name__, given=given, needed=f"[{found}, ...]")
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not name.endswith(INPUT_SCALE):  # every rank quantises by the largest of the whole layer
                setattr(module, name, nn.Parameter(_of_experts(parameter.detach(), parallel.local_experts), requires_grad=False))
        module.halfbyte.parallel = parallel


def _of_experts(tensor: torch.Tensor, held: list[int]) -> torch.Tensor:
    index = torch.tensor(held, dtype=torch.int64, device=tensor.device)
    if tensor.dtype.itemsize > 1:
        return tensor[index]
    return tensor.view(torch.uint8)[index].view(tensor.dtype)  # torch gathers no e4m3
