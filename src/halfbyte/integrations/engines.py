"""What the plug-ins of engines share: their options, and the way of one layer's experts from an engine's Parameters to calls of `fused_moe`.

An engine creates Parameters, fills them, and says when a layer is complete. `EngineModel.take_over` then arranges the experts in the memory of those
Parameters and puts others in their place, named "halfbyte_...": every tensor that was made, with one row of memory per expert, so that an engine may
move experts between ranks, let them sleep, or write new weights to the same addresses. The prepared experts themselves are `module.halfbyte_experts`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn

from halfbyte.arguments import as_device
from halfbyte.device import Target
from halfbyte.errors import HalfbyteError, InputError, UnsupportedError
from halfbyte.experts import ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat, check_activations
from halfbyte.integrations.head_start import HeadStart
from halfbyte.loading import prepare
from halfbyte.moe import warm_up, workspace_nbytes
from halfbyte.version import __version__
from halfbyte.weights import PreparedExperts, ScaleChecks

PARAMETER_PREFIX = "halfbyte_"
FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a plug-in may meet in an engine of another release, or a bug of its own: the engine goes on without it."""


@dataclass(frozen=True)
class Options:
    """What a user of an engine can say.

    Attributes:
        enabled: false leaves everything to the engine.
        activations: what the experts compute on, as in `fused_moe`.
        strict: a layer with FP4 experts that is left to the engine is an error, and so are scales that are negative or not finite.
        any_gpu: run on GPUs other than Hopper too, where an engine may have faster kernels of its own.
        peer_memory: tokens of vLLM's data-parallel ranks travel through the memory of the other GPUs of the host, where those reach each other.
    """

    enabled: bool = True
    activations: ActivationFormat = "bf16"
    strict: bool = False
    any_gpu: bool = False
    peer_memory: bool = False

    @staticmethod
    def of(given: object, where: str) -> Options:
        """The options in a JSON object.

        Raises:
            InputError: it is none, an option is unknown, or a value is none of those that there are.

        >>> Options.of({"activations": "fp8"}, "--additional-config")
        Options(enabled=True, activations='fp8', strict=False, any_gpu=False, peer_memory=False)
        """
        known = {field.name: field.default for field in fields(Options)}
        if not isinstance(given, Mapping):
            raise InputError("halfbyte's options are an object", where=where, given=repr(given), needed=f"keys {', '.join(known)}")
        unknown = sorted(map(str, given.keys() - known.keys()))
        if unknown:
            raise InputError("unknown options", where=where, given=", ".join(unknown), needed=", ".join(known))
        for name, value in given.items():
            if isinstance(known[name], bool) and not isinstance(value, bool):
                raise InputError(f"option {name} is true or false", where=where, given=repr(value), needed="true or false")
        options = Options(**given)
        check_activations(options.activations, where)
        return options


def refusal_of_device(device: torch.device | str, options: Options) -> str | None:
    """Why experts on this device are left to an engine; None where they are not."""
    target = Target.of(device)
    if target.is_cpu or target.arch == "sm_90" or options.any_gpu:
        return None
    return f"{target.name} is {target.arch}, and halfbyte's kernels for engines are for sm_90; option any_gpu takes the portable ones"


class EngineModel:
    """The MoE layers of an engine's process, while they are loaded and afterwards.

    Attributes:
        options: what the user said.
        batch_invariant: as in `fused_moe`; the engine's setting.
        stats: numbers for who measures: "layers" taken over, "prepare_host_s" that the host spent on arranging them, "warm_up_s" on compiling.
        workspace_nbytes: the workspace that serves all layers.
    """

    def __init__(self, engine: str, options: Options, log: Callable[[str], None], *, batch_invariant: bool = False) -> None:
        self.options, self.batch_invariant = options, batch_invariant
        self.stats: dict[str, float] = {"layers": 0, "prepare_host_s": 0.0, "warm_up_s": 0.0}
        self.workspace_nbytes = 0
        self._engine, self._log = engine, log
        self._checks = ScaleChecks()
        self._warm: set[tuple[str, int, int, int]] = set()
        self._kinds: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        self._noted: set[str] = set()
        self._head_start: HeadStart | None = None

    def refuse(self, name: str, reason: str) -> None:
        """Leave the FP4 experts of layer `name` to the engine; a reason is logged once.

        Raises:
            UnsupportedError: option strict.
        """
        if self.options.strict:
            raise UnsupportedError(reason, where=name, next_step="leave out option strict, and the engine's own kernels run this layer")
        if reason not in self._refused:
            self._log(f"halfbyte leaves {name} to {self._engine}: {reason}")
        self._refused[reason] = self._refused.get(reason, 0) + 1

    def note(self, text: str) -> None:
        """Log something that holds for many layers, once."""
        if text not in self._noted:
            self._noted.add(text)
            self._log(text)

    def get_ready(self, experts: Callable[[], ExpertWeights], *, top_k: int, max_tokens: int) -> None:
        """Compile what the model's first layer needs in a thread, while the engine makes layers and reads weights; `take_over` waits for it.

        Args:
            experts: gives those of a layer that the engine has made, in its Parameters, which are still to be filled.
            top_k, max_tokens: as in `take_over`.
        """
        if self._head_start is None:
            with contextlib.suppress(HalfbyteError, *FAILURES):  # what fails here fails again when the layer is taken over, which says so
                layer = experts()
                device = as_device("cuda", self._engine) if layer.device.type == "meta" else layer.device
                self._head_start = HeadStart(layer, device, self.options.activations, top_k, max_tokens, batch_invariant=self.batch_invariant)

    @torch.no_grad()
    def take_over(self, module: nn.Module, name: str, experts: ExpertWeights, parameters: Iterable[str], *, top_k: int, max_tokens: int) -> None:
        """Arrange `experts`, which lie in the Parameters of `module` that are named, and put them in the place of those.

        Where the module was taken over before, the engine has loaded other weights: they go to the same addresses as the first.

        Raises:
            InputError, UnsupportedError: as `prepare`; nothing was changed.
        """
        start = time.perf_counter()
        if self._head_start is not None:
            self._head_start.wait_to_arrange()
        held: PreparedExperts | None = getattr(module, "halfbyte_experts", None)
        if held is None:
            in_place = experts.device.type == "cuda"
            check = self._checks.of(name)
            held = prepare(experts, activations=self.options.activations, in_place=in_place, scale_check=check)
        else:
            held.update_(experts)
        for parameter in parameters:
            if parameter in module._parameters:
                delattr(module, parameter)
        for tensor_name, tensor in held.storage.tensors.items():
            parameter = PARAMETER_PREFIX + tensor_name.replace(".", "_")
            module.register_parameter(parameter, nn.Parameter(tensor, requires_grad=False))
        self.stats["prepare_host_s"] += time.perf_counter() - start
        if getattr(module, "halfbyte_experts", None) is None:
            module.halfbyte_experts = held  # type: ignore[assignment]
            self._count(held, top_k, max_tokens)

    def _count(self, experts: PreparedExperts, top_k: int, max_tokens: int) -> None:
        """Make a layer's kernels ready, once for all layers of its kind, and remember it for the log."""
        warm = (experts.description, experts.num_experts, top_k, max_tokens)
        if warm not in self._warm:
            start = time.perf_counter()
            if self._head_start is not None:
                self._head_start.wait()
            warm_up(experts, top_k, max_tokens=max_tokens, batch_invariant=self.batch_invariant)
            self.workspace_nbytes = max(self.workspace_nbytes, workspace_nbytes(experts, max_tokens, top_k, batch_invariant=self.batch_invariant))
            self.stats["warm_up_s"] += time.perf_counter() - start
            self._warm.add(warm)
        self.stats["layers"] += 1
        sizes = f"{experts.num_experts} experts of {experts.hidden} x {experts.intermediate}"
        weights = repr(experts.format) if experts.format else "dense"
        kind = f"{weights}, {experts.activation.kind}, {sizes}, layout {experts.layout}, activations {experts.activations}"
        self._kinds[kind] = self._kinds.get(kind, 0) + 1

    def finish(self) -> None:
        """To be called before every call of a layer: after loading, it waits for the checks of the scales and logs what runs where; then it is free.

        Engines serve the random weights with which people measure, whose scales are unusable: that is said, and they are served.

        Raises:
            InputError: scales are negative or not finite, with option strict.
        """
        if not self._kinds:
            return
        kinds, self._kinds = self._kinds, {}
        try:
            self._checks.wait()
        except InputError as error:
            if self.options.strict:
                raise
            self._log(f"halfbyte: results will mean nothing: {error}")
        ours = "; ".join(f"{count} MoE layers ({kind})" for kind, count in kinds.items())
        theirs = "; ".join(f"{count} layers ({reason})" for reason, count in self._refused.items()) or "nothing"
        times = f"weights arranged in {self.stats['prepare_host_s']:.2f} s, kernels ready in {self.stats['warm_up_s']:.2f} s"
        self._log(f"halfbyte {__version__} runs {ours}; {times}; left to {self._engine}: {theirs}")
