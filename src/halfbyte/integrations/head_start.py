"""`HeadStart`: what a model's first layer needs compiled, compiled in a thread while an engine makes the other layers and reads weights."""

from __future__ import annotations

import contextlib
import threading

import torch

from halfbyte.device import current
from halfbyte.experts import ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.loading import prepare
from halfbyte.loading.prepared import outline
from halfbyte.moe import warm_up


class HeadStart:
    """First the kernels that arrange weights, by arranging one expert of zeros; then those of calls, in the memory where the layer will lie.

    What fails here fails again with the layer itself, which says so.

    Args:
        experts: of a layer whose weights are still to be loaded; on "meta", where they have no memory yet, calls get no kernels.
        device: where the layer will be.
        activations, top_k, max_tokens, batch_invariant: of its calls.
    """

    def __init__(
        self, experts: ExpertWeights, device: torch.device, activations: ActivationFormat, top_k: int, max_tokens: int, *, batch_invariant: bool
    ) -> None:
        self._can_arrange = threading.Event()
        in_place = device.type == "cuda"

        def arrange() -> None:
            one = experts[:1]
            zeros = {name: torch.zeros_like(tensor, device=device) for name, tensor in one.tensors.items()}
            prepare(one.with_tensors(zeros), activations=activations, in_place=in_place)

        def call() -> None:
            if experts.device == device:
                layer = outline(experts, activations=activations, in_place=in_place)
                warm_up(layer, top_k, max_tokens=max_tokens, batch_invariant=batch_invariant)

        def compile_kernels() -> None:
            for step in (arrange, call):
                with contextlib.suppress(Exception), current(device):
                    step()
                self._can_arrange.set()

        self._thread = threading.Thread(target=compile_kernels, daemon=True)
        self._thread.start()

    def wait_to_arrange(self) -> None:
        """Return when the kernels that arrange weights are there, or cannot be."""
        self._can_arrange.wait()

    def wait(self) -> None:
        """Return when all that can be compiled is."""
        self._thread.join()
