"""`MoE`: router and experts of one layer as an nn.Module. It only holds weights; the work is `route` and `fused_moe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.arguments import check_tensors, check_type
from halfbyte.checkpoint import Checkpoint, RouterWeights, load_router
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.formats.activation_formats import ActivationFormat, check_activations
from halfbyte.loading import load_prepared
from halfbyte.loading.prepared import CacheUse
from halfbyte.moe.checks import check_prepared
from halfbyte.moe.functional import fused_moe
from halfbyte.moe.parallel import ExpertParallel
from halfbyte.moe.routing import Routing, invariant_linear, route
from halfbyte.moe.warm import warm_up
from halfbyte.weights import PreparedExperts
from halfbyte.weights.prepared import keep_address


class MoE(torch.nn.Module):
    """y = sum over the chosen experts of weight * expert(hidden).

    Inference only: no parameters. The state_dict has every tensor as it lies in memory, named after its layout, and loads into a layer of the same
    layout. `.to(device)` moves the weights; `.to(dtype)` leaves them as they are, because their bits are a format.

    *Not* part of it: shared experts, the residual, the norm before the layer.
    """

    def __init__(
        self,
        router: RouterWeights,
        experts: PreparedExperts,
        *,
        activations: ActivationFormat | None = None,
        batch_invariant: bool = False,
        parallel: ExpertParallel | None = None,
    ) -> None:
        """Hold `router` and `experts`, which lie on one device; `activations` and `batch_invariant` as `fused_moe`, routing included.

        With `parallel` the experts are those of this rank, and every rank calls the layer with tokens of its own.

        Raises:
            InputError: router and experts do not belong together, or another argument does not fit.
            UnsupportedError: the layer chooses experts by token id (DeepSeek-V4's first layers) and so cannot be run from hidden states; batch
                invariance over several ranks.
        """
        check_type("MoE", RouterWeights, router=router)
        check_prepared(experts, "MoE")
        if parallel is not None:
            check_type("MoE", ExpertParallel, parallel=parallel)
        if activations is not None:
            check_activations(activations, "MoE")
        if router.weight.shape[1] != experts.hidden or router.weight.device != experts.device:
            given = f"a router for hidden {router.weight.shape[1]} on {router.weight.device}"
            needed = f"hidden {experts.hidden} on {experts.device}"
            raise InputError("router and experts do not belong together", where="MoE", given=given, needed=needed)
        if parallel is not None and batch_invariant:
            raise UnsupportedError("no batch invariance over several ranks", where="MoE", next_step="leave one of the two out")
        super().__init__()
        if router.token_experts is not None:
            raise UnsupportedError(
                "this layer's experts are chosen by token id, not from hidden states",
                where="MoE",
                next_step="look the ids up in RouterWeights.token_experts and call halfbyte.fused_moe",
            )
        self.router, self.batch_invariant, self.top_k, self.parallel = router, batch_invariant, router.rule.top_k, parallel
        self.experts = experts if activations is None else replace(experts, activations=activations)
        self._keep_addresses()

    @classmethod
    def from_checkpoint(
        cls,
        model: str | Path | Checkpoint,
        layer: int,
        *,
        device: torch.device | str = "cpu",
        activations: ActivationFormat = "bf16",
        batch_invariant: bool = False,
        cache: CacheUse = "read",
        parallel: ExpertParallel | None = None,
    ) -> MoE:
        """Read one layer of a checkpoint directory, Hub model `org/name` or open `Checkpoint`; with `parallel` only the experts of this rank.

        `cache` and errors as `load_prepared`, and `load_router`.

        >>> from pathlib import Path
        >>> layer = halfbyte.MoE.from_checkpoint(Path(halfbyte.__file__).parent / "demo_model", 0)
        >>> layer(torch.randn(2, 5, 256, dtype=torch.bfloat16)).shape
        torch.Size([2, 5, 256])
        """
        if parallel is not None:
            check_type("MoE", ExpertParallel, parallel=parallel)
        checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
        held = None if parallel is None else parallel.local_range
        experts = load_prepared(checkpoint, layer, device=device, activations=activations, experts=held, cache=cache)
        return cls(load_router(checkpoint, layer, device), experts, batch_invariant=batch_invariant, parallel=parallel)

    def route(self, hidden: torch.Tensor) -> Routing:
        """Choose experts for hidden [T, H]; the logits are computed in fp32 whatever the dtype of the router's weight."""
        product = invariant_linear if self.batch_invariant else torch.nn.functional.linear
        logits = product(hidden.float(), self.router.weight.float())
        if self.router.logit_bias is not None:
            logits = logits + self.router.logit_bias.float()
        rule = self.router.rule
        # Not by asdict: on Python 3.11 it deep-copies strings, which torch.compile of torch 2.11 refuses.
        arguments = {field.name: getattr(rule, field.name) for field in fields(rule)}
        return route(logits, bias=self.router.correction_bias, **arguments)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] bf16, fp16 or fp32 to the same shape and dtype."""
        check_tensors("MoE", hidden=hidden)
        if hidden.ndim == 0 or hidden.shape[-1] != self.experts.hidden:
            raise InputError("hidden does not fit", where="MoE", given=tuple(hidden.shape), needed=f"[..., {self.experts.hidden}]")
        tokens = hidden.reshape(-1, hidden.shape[-1])
        routing = self.route(tokens)
        if self.parallel is not None:
            return self.parallel.forward(tokens, self.experts, *routing).view(hidden.shape)
        result = fused_moe(tokens, self.experts, *routing, batch_invariant=self.batch_invariant)
        return result.view(hidden.shape)

    @torch.no_grad()
    def warm_up(self, **options: Any) -> None:
        """Compile what the layer can need, so that no later call does: `halfbyte.warm_up` with the layer's own settings, and the routing.

        >>> from pathlib import Path
        >>> halfbyte.MoE.from_checkpoint(Path(halfbyte.__file__).parent / "demo_model", 0).warm_up(max_tokens=8192)
        """
        self.route(torch.zeros((1, self.experts.hidden), dtype=torch.float32, device=self.experts.device))
        warm_up(self.experts, self.top_k, batch_invariant=self.batch_invariant, **options)

    def extra_repr(self) -> str:
        w, rule = self.experts, self.router.rule
        sizes = f"{w.num_experts} experts {repr(w.format) if w.format else 'dense'}, hidden {w.hidden}, intermediate {w.intermediate}"
        invariant = ", batch invariant" if self.batch_invariant else ""
        return f"{sizes}, {rule.method} top-{rule.top_k}, activations {w.activations}{invariant}"

    def _keep_addresses(self) -> None:
        for tensor in self._router_tensors().values():
            keep_address(tensor)

    def _router_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {name: getattr(self.router, name) for name in ("weight", "logit_bias", "correction_bias")}
        return {f"router.{name}": tensor for name, tensor in tensors.items() if tensor is not None}

    def _all_tensors(self) -> dict[str, torch.Tensor]:
        experts = self.experts  # tensors of two layouts may have the same names and shapes, as those of "hopper" and "hopper_fp8" have
        return self._router_tensors() | {f"experts.{experts.layout}.{name}": tensor for name, tensor in experts.storage.tensors.items()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Tensors are the module's state, though none is a parameter: `experts.LAYOUT.*` as they are held."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self._all_tensors().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Copy into the tensors that are here, so that no address changes; another layout, shape or dtype is an error of `load_state_dict`."""
        _, strict, missing, unexpected, errors = rest
        tensors = {prefix + name: tensor for name, tensor in self._all_tensors().items()}
        missing += [name for name in tensors if name not in state_dict] if strict else []
        unexpected += [name for name in state_dict if name.startswith(prefix) and name not in tensors] if strict else []
        for name in tensors.keys() & state_dict.keys():
            given, tensor = state_dict[name], tensors[name]
            if (given.shape, given.dtype) == (tensor.shape, tensor.dtype):
                tensor.copy_(given)
            else:
                errors.append(f"{name}: given {given.dtype} {list(given.shape)}, needed {tensor.dtype} {list(tensor.shape)}")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MoE:
        # nn.Module.to, .cuda and .cpu all come through here. The probe is an integer tensor, so a change of dtype does not touch it.
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.experts.device)).device
        if device != self.experts.device:
            self.experts = self.experts.to(device)
            router = self.router
            bias, correction = (None if tensor is None else tensor.to(device) for tensor in (router.logit_bias, router.correction_bias))
            self.router = replace(router, weight=router.weight.to(device), logit_bias=bias, correction_bias=correction)
            self._keep_addresses()
        return self
