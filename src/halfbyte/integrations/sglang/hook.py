"""The hooks: where SGLang chooses the quantisation method of a FusedMoE layer, halfbyte looks at the choice and may take it over."""

from __future__ import annotations

import functools
import json
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from halfbyte.errors import HalfbyteError, InputError
from halfbyte.integrations import sglang as plugin
from halfbyte.integrations.engines import FAILURES, EngineModel, Options
from halfbyte.integrations.sglang.methods import HOLDINGS, Arguments, Layer, kind_of, refusal

logger = logging.getLogger("sglang.halfbyte")

# Configurations that give a layer with FP4 experts its method, or make one themselves. Classes that inherit from these come by here, too.
_QUANTIZATION = "sglang.srt.layers.quantization"
CHOICES = tuple(
    f"{_QUANTIZATION}.{config}.get_quant_method"
    for config in (
        "modelopt_quant.ModelOptFp4Config",
        "modelopt_quant.ModelOptMixedPrecisionConfig",
        "modelopt_quant.HybridFp8NvFp4Config",
        "compressed_tensors.compressed_tensors.CompressedTensorsConfig",
        "fp8.Fp8Config",
        "mxfp4.Mxfp4Config",
    )
)
# Where weights are loaded and SGLang 0.5.17 does not say that the last one has come.
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
UPDATES = tuple(f"{_UPDATER}.update_weights_from_{source}" for source in ("tensor", "distributed", "ipc"))


def install() -> None:
    """Register the hooks; SGLang applies them when all plug-ins have theirs."""
    for target in CHOICES:
        HookRegistry.register(target, choose, HookType.AROUND)
    if not hasattr(pkgutil.resolve_name(_UPDATER), "end_weight_update"):
        for target in UPDATES:
            HookRegistry.register(target, arrange_updated, HookType.AROUND)


def choose(original: Callable[..., Any], config: Any, layer: Layer, *args: Any, **kwargs: Any) -> Any:
    """In the place of a configuration's get_quant_method."""
    method = original(config, layer, *args, **kwargs)
    if not _has_fp4_experts(layer, method):
        return method
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
    from sglang.srt.runtime_context import get_server_args

    arguments = get_server_args()
    model = model_of(_options(arguments), bool(arguments.enable_deterministic_inference))
    try:
        reason = refusal(layer, method, get_moe_runner_backend(), get_moe_a2a_backend(), arguments, model.options)
        if reason is None:
            from halfbyte.integrations.sglang.takeover import take_over

            return take_over(layer, method, model, name=layer.layer_name, max_tokens=_max_tokens(arguments))
    except (HalfbyteError, *FAILURES) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        model.refuse(layer.layer_name, reason)
    return method


def arrange_updated(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of an update: afterwards, layers that it gave weights are arranged."""
    result = original(updater, *args, **kwargs)
    for module in updater.get_model().modules():
        method = getattr(module, "quant_method", None)
        if method is not None and hasattr(method, "halfbyte"):
            method.process_weights_after_loading(module)
    return result


@functools.cache
def model_of(options: Options, batch_invariant: bool) -> EngineModel:
    """The model of this process; a draft model beside it has the same options."""
    model = EngineModel("SGLang", options, logger.info, batch_invariant=batch_invariant)
    plugin.STATS = model.stats
    return model


def _has_fp4_experts(layer: Layer, method: Any) -> bool:
    if method is None or not hasattr(layer, "moe_runner_config") or hasattr(method, "halfbyte"):
        return False
    kind = kind_of(layer, method)
    return kind in HOLDINGS or "fp4" in kind.lower()


def _options(arguments: Arguments) -> Options:
    """Raises InputError: an option that is unknown, or vLLM's alone."""
    given = json.loads(arguments.json_model_override_args or "{}")
    options = Options.of(given.get("halfbyte", {}), where="--json-model-override-args")
    if options.peer_memory:
        raise InputError("option peer_memory is for vLLM", where="--json-model-override-args", given="true", needed="false, or not given")
    return options


def _max_tokens(arguments: Arguments) -> int:
    """Tokens of one step, of all ranks whose tokens are gathered."""
    chunk = arguments.chunked_prefill_size
    return (chunk if chunk is not None and chunk > 0 else arguments.max_prefill_tokens) * max(1, arguments.dp_size)
