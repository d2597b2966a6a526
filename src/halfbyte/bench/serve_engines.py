"""vLLM and SGLang without a server, as `bench serve` uses them: one model, given token ids, in the process of `serve_worker`.

Facts of both engines are from the releases named in docs/serve.md. Their packages are imported where they are used.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from halfbyte.bench.serve_checks import EngineLayer, check_layers, experts_source
from halfbyte.bench.serve_weights import GEOMETRIES, Filled

_MAX_LENGTH, _MAX_PROMPTS, _MAX_STEP_TOKENS = 4096, 256, 8192
_MEMORY_SHARE = 0.85
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What one process measures.

    Attributes:
        engine, system: which engine; "stock", the name of another backend of its own, or "halfbyte".
        activations: for "halfbyte".
        model: a directory; with `geometry`, one with a config.json alone.
        geometry: a key of `GEOMETRIES` whose weights are random; "" reads the model's files.
        seed: of weights and prompts.
        options: arguments of the engine beside those that every system gets.
        workloads: fields of `Workload`.
        repeats: how often each is timed at least.
        scratch: a directory for files of this run.
        launched: when the process was started, by `time.time`.
    """

    engine: str
    system: str
    activations: str
    model: str
    geometry: str
    seed: int
    options: Mapping[str, Any]
    workloads: Sequence[Mapping[str, Any]]
    repeats: int
    scratch: str
    launched: float = 0.0

    @property
    def filled(self) -> Filled | None:
        return Filled(GEOMETRIES[self.geometry], self.seed) if self.geometry else None

    @staticmethod
    def read(file: Path) -> Plan:
        return Plan(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))


class OfflineEngine(Protocol):
    """An engine that runs."""

    def generate(self, prompts: Sequence[list[int]], tokens_out: int) -> list[list[int]]:
        """Exactly `tokens_out` greedy tokens for each prompt."""

    def facts(self) -> dict[str, Any]:
        """Fields of `StartRow`: processing_s, kernels_s, weights_gib, kv_tokens, layer_error, checked; those that are known."""


class _Processing:
    """Times what an engine does with weights that were read, and looks at memory afterwards."""

    def __init__(self, engine: str) -> None:
        self.facts: dict[str, Any] = {}
        self._plugin = f"halfbyte.integrations.{engine}"

    def around(self, process: Callable[[], Any]) -> Any:
        _synchronize()
        start = time.perf_counter()
        result = process()
        _synchronize()
        self.facts["processing_s"] = time.perf_counter() - start
        if self._plugin in sys.modules:  # the engine has called it
            self.facts["kernels_s"] = sys.modules[self._plugin].STATS.get("warm_up_s")
        if torch.cuda.is_available():
            self.facts["weights_gib"] = torch.cuda.memory_allocated() / _GIB
        return result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class VLLM:
    """vLLM 0.26 and newer, its model in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""

    def __init__(self, plan: Plan):
        from vllm import LLM

        self._filled, self._processing = plan.filled, _Processing(plan.engine)
        self._models: list[Any] = []
        self._watch_processing()
        arguments: dict[str, Any] = {
            "model": plan.model,
            "dtype": "bfloat16",
            "seed": plan.seed,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,  # the prompts of a repetition are those of the run before
            "max_model_len": _MAX_LENGTH,
            "max_num_seqs": _MAX_PROMPTS,
            "max_num_batched_tokens": _MAX_STEP_TOKENS,
        }
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = _MEMORY_SHARE
        if self._filled is not None:
            arguments["load_format"] = self._register_loader(self._filled)
        if plan.system == "halfbyte":
            arguments["additional_config"] = {"halfbyte": {"activations": plan.activations, "strict": True}}
        elif plan.system != "stock":
            arguments["moe_backend"] = plan.system
        self._llm = LLM(**arguments | dict(plan.options))
        self._source = experts_source(Path(plan.model), self._filled)

    def generate(self, prompts: Sequence[list[int]], tokens_out: int) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens_out, ignore_eos=True, detokenize=False)
        answers = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def facts(self) -> dict[str, Any]:
        cache = self._llm.llm_engine.vllm_config.cache_config
        known = {**self._processing.facts, "kv_tokens": cache.num_gpu_blocks * cache.block_size}
        if not self._models:
            return {**known, "checked": "not, the model is in other processes"}
        model = self._models[-1]
        layers = [_vllm_layer(name, module) for name, module in model.named_modules() if _is_a(module, "RoutedExperts")]
        return {**known, **check_layers(layers, self._source, next(model.parameters()).device)}

    def _watch_processing(self) -> None:
        from vllm.model_executor.model_loader import base_loader

        process = base_loader.process_weights_after_loading

        def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._models.append(model)
            return self._processing.around(lambda: process(model, *args, **kwargs))

        base_loader.process_weights_after_loading = watched

    def _register_loader(self, filled: Filled) -> str:
        """Let vLLM's loaders include one that fills; its name."""
        from vllm.model_executor.model_loader import base_loader, register_model_loader

        class RandomLoader(base_loader.BaseModelLoader):
            def download_model(self, model_config: Any) -> None:
                pass

            def load_weights(self, model: Any, model_config: Any) -> None:
                for name, parameter in model.named_parameters():
                    filled.fill(name, parameter.data.as_subclass(torch.Tensor))

        register_model_loader("halfbyte_random")(RandomLoader)
        return "halfbyte_random"


def _is_a(module: torch.nn.Module, name: str) -> bool:
    """Whether a module is of the engine's class of this name, or of one made of it: engines have such for single models."""
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _vllm_layer(name: str, module: Any) -> EngineLayer:
    def apply(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return module.quant_method.apply(module, hidden, weights, ids, None, None)

    return EngineLayer(name, module.hidden_size, module.global_num_experts, module.top_k, apply)


class SGLang:
    """SGLang 0.5.17 and newer. Its model is in a process of its own, where `watch_sglang` writes its facts to a file."""

    def __init__(self, plan: Plan):
        import sglang

        arguments: dict[str, Any] = {
            "model_path": plan.model,
            "dtype": "bfloat16",
            "random_seed": plan.seed,
            "skip_tokenizer_init": True,
            "disable_radix_cache": True,  # the prompts of a repetition are those of the run before
            "context_length": _MAX_LENGTH,
            "max_running_requests": _MAX_PROMPTS,
            "chunked_prefill_size": _MAX_STEP_TOKENS,
            "max_prefill_tokens": _MAX_STEP_TOKENS,
            "mem_fraction_static": _MEMORY_SHARE,
        }
        if plan.geometry:
            arguments["load_format"] = "dummy"
        if plan.system == "halfbyte":
            options = {"halfbyte": {"activations": plan.activations, "strict": True}}
            arguments["json_model_override_args"] = json.dumps(options)
        elif plan.system != "stock":
            arguments["moe_runner_backend"] = plan.system
        self._facts = _facts_file(plan)
        self._engine = sglang.Engine(**arguments | dict(plan.options))

    def generate(self, prompts: Sequence[list[int]], tokens_out: int) -> list[list[int]]:
        sampling = {"temperature": 0, "max_new_tokens": tokens_out, "ignore_eos": True}
        return [list(answer["output_ids"]) for answer in self._engine.generate(input_ids=list(prompts), sampling_params=sampling)]

    def facts(self) -> dict[str, Any]:
        known = json.loads(self._facts.read_text()) if self._facts.exists() else {"checked": "not, SGLang's process told nothing"}
        return {"kv_tokens": self._engine.get_server_info().get("max_total_num_tokens"), **known}


def watch_sglang(plan: Plan) -> None:
    """In each of SGLang's processes, before its plug-ins: through its own hooks, fill random weights, time their processing and check layers."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    filled, processing = plan.filled, _Processing(plan.engine)
    loader = "sglang.srt.model_loader.loader"
    started = 0.0

    def fill(_: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal started
        assert filled is not None
        for name, parameter in model.named_parameters():
            filled.fill(name, parameter.data.as_subclass(torch.Tensor))
        _synchronize()
        started = time.perf_counter()

    def load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model = processing.around(lambda: original(*args, **kwargs))
        # Of the whole loading, that after the filling; of files, SGLang reads and processes layer by layer.
        processing.facts["processing_s"] = time.perf_counter() - started if started else None
        layers = [_sglang_layer(name, module) for name, module in model.named_modules() if _is_a(module, "FusedMoE")]
        source, device = experts_source(Path(plan.model), filled), next(model.parameters()).device
        _facts_file(plan).write_text(json.dumps({**processing.facts, **check_layers(layers, source, device)}))
        return model

    if filled is not None:
        HookRegistry.register(f"{loader}.initialize_dummy_weights", fill, HookType.AROUND)
    HookRegistry.register(f"{loader}.{'Dummy' if filled else 'Default'}ModelLoader.load_model", load, HookType.AROUND)


def _sglang_layer(name: str, module: Any) -> EngineLayer:
    def apply(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        logits = torch.zeros(len(ids), module.num_experts, device=ids.device, dtype=torch.float32)
        given = StandardDispatchOutput(hidden, None, StandardTopKOutput(weights, ids, logits))
        return module.quant_method.apply(module, given).hidden_states

    return EngineLayer(name, module.hidden_size, module.num_experts, module.top_k, apply)


def _facts_file(plan: Plan) -> Path:
    return Path(plan.scratch) / "facts.json"


OFFLINE: Mapping[str, Callable[[Plan], OfflineEngine]] = {"vllm": VLLM, "sglang": SGLang}
# What the engine's own processes need in their environment; "none" is the name of no plug-in.
ENVIRONMENT = {
    "vllm": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
    "sglang": {},
}
WITHOUT_PLUGINS = {"vllm": {"VLLM_PLUGINS": "none"}, "sglang": {"SGLANG_PLUGINS": "none"}}
# Backends of an engine's own that --against may name beside "stock".
BACKENDS = {"vllm": ("humming", "marlin"), "sglang": ("marlin",)}
