"""The hook: where vLLM chooses the quantisation method of a layer's routed experts, halfbyte looks at the choice and may take it over."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vllm.envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from halfbyte.integrations import vllm as plugin
from halfbyte.integrations.engines import FAILURES, EngineModel, Options
from halfbyte.integrations.vllm.methods import HOLDINGS, Layer, refusal, refusal_of_peers
from halfbyte.integrations.vllm.peers import Peers
from halfbyte.integrations.vllm.takeover import still_to_load, take_over

logger = init_logger("vllm.halfbyte")

# Where vLLM's methods look for a kernel of vLLM's own when they are made. They raise where there is none, which does not matter if halfbyte has one.
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
SELECTORS = {
    f"{_QUANTIZATION}.modelopt": ("select_nvfp4_moe_backend",),
    f"{_QUANTIZATION}.mxfp4": ("select_mxfp4_moe_backend", "select_deepseek_v4_mxfp4_moe_backend"),
    f"{_COMPRESSED}_w4a4_nvfp4": ("select_nvfp4_moe_backend",),
}


def install() -> None:
    """Wrap the choice, and the loading of a layer, once per process."""
    original = RoutedExperts._get_quant_method
    if hasattr(original, "halfbyte"):
        return

    @functools.wraps(original)
    def choose(layer: Layer, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        with _without_a_kernel_of_its_own(quant_config) as failures:
            method = original(layer, prefix, quant_config, moe_config)
        reason = None
        if _is_fp4(method):
            config = get_current_vllm_config()
            model = model_of(_options(config))
            try:
                reason = refusal(layer, method, model.options, config.lora_config)
                if reason is None:
                    alone = refusal_of_peers(layer, model.options, config)
                    if alone is not None and model.options.peer_memory:
                        model.note(f"halfbyte lets vLLM move tokens between ranks: {alone}")
                    peers = Peers(model, config.scheduler_config.max_num_batched_tokens) if alone is None else None
                    take_over(method, model, _max_tokens(config), peers)
            except FAILURES as error:
                reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                model.refuse(prefix, reason)
        if failures and not hasattr(method, "halfbyte"):
            raise failures[0]
        return method

    load = RoutedExperts.load_weights

    @functools.wraps(load)
    def load_weights(layer: Layer, weights: Any) -> Any:
        return load(layer, still_to_load(layer, weights))

    choose.halfbyte = True  # type: ignore[attr-defined]
    RoutedExperts._get_quant_method, RoutedExperts.load_weights = choose, load_weights


@functools.cache
def model_of(options: Options) -> EngineModel:
    """The model of this process; a draft model beside it has the same options."""
    model = EngineModel("vLLM", options, logger.info, batch_invariant=bool(vllm.envs.VLLM_BATCH_INVARIANT))
    plugin.STATS = model.stats
    return model


def _options(config: VllmConfig) -> Options:
    """Raises InputError: an option that is unknown."""
    additional = config.additional_config
    given = additional.get("halfbyte", {}) if isinstance(additional, dict) else {}
    return Options.of(given, where="--additional-config")


def _is_fp4(method: Any) -> bool:
    name = type(method).__name__
    return name in HOLDINGS or "fp4" in name.lower()


def _max_tokens(config: VllmConfig) -> int:
    """Tokens of one step, of all ranks whose tokens are gathered."""
    return config.scheduler_config.max_num_batched_tokens * config.parallel_config.data_parallel_size


@contextmanager
def _without_a_kernel_of_its_own(quant_config: Any) -> Iterator[list[Exception]]:
    """Within, a method of vLLM's is made although vLLM has no kernel for it. Yields what vLLM would have raised."""
    if type(quant_config).__module__.startswith(f"{_QUANTIZATION}.compressed_tensors."):
        importlib.import_module(f"{_COMPRESSED}_w4a4_nvfp4")  # which vLLM imports when it makes the first method
    failures: list[Exception] = []

    def optional(select: Any) -> Any:
        @functools.wraps(select)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            try:
                return select(*args, **kwargs)
            except FAILURES as error:
                failures.append(error)
                return None, None

        return chosen

    modules = [(sys.modules[module], name) for module, names in SELECTORS.items() if module in sys.modules for name in names]
    replaced = [(module, name, getattr(module, name)) for module, name in modules if hasattr(module, name)]
    for module, name, select in replaced:
        setattr(module, name, optional(select))
    try:
        yield failures
    finally:
        for module, name, select in replaced:
            setattr(module, name, select)
