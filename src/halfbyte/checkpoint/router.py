"""Files to `RouterWeights`: the tensors that choose the experts of a token. None that the family has is missing, and none is left out."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.arguments import as_device
from halfbyte.checkpoint.families import RoutingRule, tensor_names
from halfbyte.checkpoint.families.description import Config
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import count_nonfinite

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class RouterWeights:
    """The router of one MoE layer: logits = hidden @ weight.T (+ logit_bias), then `route(logits, ..., bias=correction_bias)` by `rule`.

    Attributes:
        weight: [E, H] in the file's dtype; compute the logits in fp32.
        rule: method name and parameters.
        logit_bias: [E], added to the logits (gpt-oss), or None.
        correction_bias: fp32 [E], added to the scores for selection only (DeepSeek-V3, GLM-4, DeepSeek-V4), or None.
        token_experts: int64 [vocabulary, k], the experts of every token id (DeepSeek-V4's first layers, which do not select), or None.
    """

    weight: torch.Tensor
    rule: RoutingRule
    logit_bias: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None
    token_experts: torch.Tensor | None = None


def load_router(model: str | Path | Checkpoint, layer: int, device: torch.device | str = "cpu") -> RouterWeights:
    """Read the router of one MoE layer.

    Raises:
        CheckpointError: a tensor that is missing, of another dtype or shape, or not finite; two for one thing; no MoE layer.
        UnsupportedError: a model family that halfbyte does not know, or a tensor that its router does not use.

    >>> from pathlib import Path
    >>> router = load_router(Path(halfbyte.__file__).parent / "demo_model", 0)
    >>> router.weight.shape, router.rule.method, router.rule.top_k
    (torch.Size([16, 256]), 'renormalize', 4)
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    moe = checkpoint.moe
    rule, names = moe.known_routing(str(checkpoint.path / "config.json")), tensor_names(moe.family)
    tensors, hashed = _RouterTensors(checkpoint, moe.block_of(layer), as_device(device, "load_router")), layer in moe.hashed_layers
    weight = tensors.read(names.router, moe.num_experts, moe.hidden)
    logit_bias = tensors.read((names.logit_bias,), moe.num_experts) if names.logit_bias else None
    correction = None
    if rule.method in ("deepseek_v3", "deepseek_v4") and ((moe.corrected and not hashed) or tensors.has(names.correction_bias)):
        correction = tensors.read(names.correction_bias, moe.num_experts).float()
    token_experts = tensors.read_ids(names.token_experts, rule.top_k, moe.num_experts) if hashed else None
    tensors.check_all_used(names.correction_bias)
    return RouterWeights(weight, rule, logit_bias, correction, token_experts)


class _RouterTensors:
    """The tensors beside the experts in the MoE module `block`, and which of them have been read, to `device`."""

    def __init__(self, checkpoint: Checkpoint, block: str, device: torch.device | str):
        self._checkpoint, self._block, self._device = checkpoint, block, device
        self._read: list[str] = []

    def has(self, leaves: tuple[str, ...]) -> bool:
        return any(f"{self._block}.{leaf}" in self._checkpoint for leaf in leaves)

    def read(self, leaves: tuple[str, ...], *shape: int) -> torch.Tensor:
        """The only one of these tensors."""
        leaf = self._only(leaves)
        dtype, given = self._checkpoint.dtype_shape(f"{self._block}.{leaf}")
        if given != shape or dtype not in _FLOATS:
            raise self._misfit(leaf, f"{dtype} {given}", f"unquantised {shape}")
        tensor = self._checkpoint.read(f"{self._block}.{leaf}")
        if count := count_nonfinite(tensor):
            raise self._misfit(leaf, f"{count} NaN or infinite values", "finite values")
        return tensor.to(self._device, copy=True)

    def read_ids(self, leaf: str, top_k: int, num_experts: int) -> torch.Tensor:
        """The experts of every token id, [vocabulary, top_k]."""
        dtype, given = self._checkpoint.dtype_shape(f"{self._block}.{self._only((leaf,))}")
        tokens = Config(self._checkpoint.config, str(self._checkpoint.path / "config.json")).get("vocab_size", given[0] if given else 0)
        if dtype not in (torch.int32, torch.int64) or given != (tokens, top_k):
            raise self._misfit(leaf, f"{dtype} {given}", f"integers ({tokens}, {top_k})")
        ids = self._checkpoint.read(f"{self._block}.{leaf}").to(self._device, torch.int64, copy=True)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
            raise self._misfit(leaf, f"experts {int(ids.min())} to {int(ids.max())}", f"0 to {num_experts - 1}")
        return ids

    def check_all_used(self, others: tuple[str, ...]) -> None:
        """Raise UnsupportedError for a tensor in the router's module, or one of these `others`, that was not read."""
        names, prefix = self._checkpoint.names, f"{self._block}."
        first, last = (bisect_left(names, self._block + end) for end in (".", "/"))  # "/" follows "." in the order of names
        leaves = (name.removeprefix(prefix) for name in names[first:last])
        modules = {module for leaf in self._read if (module := leaf.rpartition(".")[0])}
        unused = next((leaf for leaf in leaves if leaf not in self._read and (leaf in others or leaf.rpartition(".")[0] in modules)), None)
        if unused is not None:
            raise UnsupportedError(
                f"a tensor of the router that halfbyte does not read: {prefix}{unused}",
                where=str(self._checkpoint.file_of(prefix + unused)),
                needed=f"{', '.join(self._read)} of {self._checkpoint.moe.family}",
            )

    def _only(self, leaves: tuple[str, ...]) -> str:
        found = [leaf for leaf in leaves if self.has((leaf,))]
        if len(found) != 1:
            needed = " or ".join(f"{self._block}.{leaf}" for leaf in found or leaves)
            problem = "two tensors for one thing" if found else "no router, or a part of it is missing"
            raise CheckpointError(problem, where=str(self._checkpoint.path), needed=needed, next_step="download the model again")
        self._read += found
        return found[0]

    def _misfit(self, leaf: str, given: str, needed: str) -> CheckpointError:
        name = f"{self._block}.{leaf}"
        return CheckpointError(f"router tensor {name} does not fit", where=str(self._checkpoint.file_of(name)), given=given, needed=needed)
