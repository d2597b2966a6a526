"""FP4 mixture-of-experts models in transformers. Importing this module registers halfbyte; then

    model = AutoModelForCausalLM.from_pretrained(DIR)

loads ModelOpt NVFP4, compressed-tensors nvfp4-pack-quantized and mxfp4-pack-quantized, AMD Quark MXFP4, gpt-oss MXFP4 and DeepSeek-V4 checkpoints,
with FP8 layers beside them or without. Their experts stay in 4 bits, on the model's own Experts modules. Every other format, and
`Mxfp4Config(dequantize=True)`, stays with transformers. Registering is the only thing the import changes; it includes a `from_pretrained` that also
sees hf_quant_config.json, and a `save_pretrained` that writes packed models as they were.

On a GPU of compute capability 9.0 the experts are rearranged for its kernels, at the first call and in the memory they have (`set_layout`).

| checkpoint | transformers alone (5.23) | with halfbyte |
|---|---|---|
| ModelOpt NVFP4 | quant_method unknown: tensors of the wrong shape | runs |
| compressed-tensors NVFP4 | needs its package; experts lose weight_global_scale | runs |
| Quark MXFP4 | needs its package | runs |
| gpt-oss MXFP4 | dense bf16 unless a hub kernel fits the device | runs in 4 bits on any device |

Not supported: training.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.arguments import as_device, check_name, check_type
from halfbyte.checkpoint.json_files import read_json
from halfbyte.checkpoint.source import resolve_model
from halfbyte.device import Target, on_default_stream
from halfbyte.errors import InputError, UnsupportedError

try:
    import transformers.modeling_utils
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        PreTrainedModel,
    )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils import cached_file
except ImportError as error:
    raise UnsupportedError(f"this needs transformers 5.17 or newer: {error}", where=__name__, next_step="run: pip install 'halfbyte[hf]'") from error

from halfbyte.formats.activation_formats import ActivationFormat, check_activations
from halfbyte.integrations.packing import is_attached, restore_canonical
from halfbyte.integrations.transformers.modules import experts_forward
from halfbyte.integrations.transformers.parallel import set_parallel
from halfbyte.integrations.transformers.quantizers import IMPLEMENTATION, FP4Config, FP4Quantizer, is_compressed_fp4, is_fp8_beside_fp4, is_quark_fp4
from halfbyte.integrations.transformers.saving import save_packed

# Of `cached_file`: a file that is not there, or cannot be asked for, is None.
_OPTIONAL = {f"_raise_exceptions_for_{reason}": False for reason in ("missing_entries", "connection_errors", "gated_repo")}
# What `from_pretrained` is loading: a directory or Hub name, and the arguments that say more of where its files are.
_OF_FILES = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
_files: ContextVar[tuple[Any, dict[str, Any]]] = ContextVar("halfbyte_files", default=(None, {}))

__all__ = ["load", "register", "set_activations", "set_layout", "set_parallel"]


def register() -> None:
    """Put halfbyte's experts implementation and quantizers into transformers' tables. The import does it; again is harmless."""
    if IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS:
        return
    stock_mxfp4 = AUTO_QUANTIZER_MAPPING["mxfp4"]

    def mxfp4_quantizer(config: Any, *, pre_quantized: bool = True, **kwargs: Any) -> Any:
        if pre_quantized and not config.dequantize:
            return FP4Quantizer(config, **kwargs)
        return stock_mxfp4(config, pre_quantized=pre_quantized, **kwargs)

    transformers.modeling_utils.get_hf_quantizer = _reading_hf_quant_config(transformers.modeling_utils.get_hf_quantizer)
    PreTrainedModel.from_pretrained = classmethod(_saying_from_where(PreTrainedModel.from_pretrained.__func__))
    PreTrainedModel.save_pretrained = _saving_packed(PreTrainedModel.save_pretrained)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    for method, is_fp4 in {"compressed-tensors": is_compressed_fp4, "quark": is_quark_fp4, "fp8": is_fp8_beside_fp4}.items():
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _fp4_or(AUTO_QUANTIZATION_CONFIG_MAPPING[method], is_fp4)
        AUTO_QUANTIZER_MAPPING[method] = _quantizer_or(AUTO_QUANTIZER_MAPPING[method])
    AUTO_QUANTIZATION_CONFIG_MAPPING["modelopt"] = FP4Config
    AUTO_QUANTIZER_MAPPING.update({"modelopt": FP4Quantizer, "mxfp4": mxfp4_quantizer})


def _saying_from_where(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`from_pretrained` that tells `_add_hf_quant_config` where the files are: a configuration knows only where `AutoConfig` read it."""

    @wraps(stock)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        before = _files.set((pretrained_model_name_or_path, {key: kwargs[key] for key in _OF_FILES if key in kwargs}))
        try:
            return stock(cls, pretrained_model_name_or_path, *args, **kwargs)
        finally:
            _files.reset(before)

    return from_pretrained


def _reading_hf_quant_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`get_hf_quantizer` that also sees hf_quant_config.json where config.json says nothing, and `expert_dtype` wherever a config has it.

    Transformers has no table for these.
    """

    @wraps(stock)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        if quantization_config is None:
            _add_hf_quant_config(config)
            described = getattr(config, "quantization_config", None)
            if isinstance(described, dict) and getattr(config, "expert_dtype", None) is not None:
                config.quantization_config = {"expert_dtype": config.expert_dtype, **described}
        return stock(config, quantization_config, *args, **kwargs)

    return get_hf_quantizer


def _add_hf_quant_config(config: Any) -> None:
    """Give `config` the quantization_config that hf_quant_config.json, beside the files of the model that is being loaded, describes."""
    text_config = config.get_text_config(decoder=True)
    (model, options), commit = _files.get(), getattr(config, "_commit_hash", None)
    if any(getattr(one, "quantization_config", None) is not None for one in (config, text_config)) or not model:
        return
    if commit and config._name_or_path in ("", str(model)):
        options = {**options, "revision": commit}
    file = cached_file(model, "hf_quant_config.json", **options, **_OPTIONAL)
    if file is not None:
        config.quantization_config = {**read_json(Path(file)), "quant_method": "modelopt"}


def _quantizer_or(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Our quantizer for our config class; transformers' own for the rest."""

    def quantizer(config: Any, **kwargs: Any) -> Any:
        return (FP4Quantizer if isinstance(config, FP4Config) else stock)(config, **kwargs)

    return quantizer


def _saving_packed(stock: Callable[..., None]) -> Callable[..., None]:
    """`save_pretrained` that also writes packed models."""

    @wraps(stock)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        is_packed = isinstance(getattr(self, "hf_quantizer", None), FP4Quantizer) and not getattr(self, "_hf_peft_config_loaded", False)
        return save_packed(stock, self, *args, **kwargs) if is_packed else stock(self, *args, **kwargs)

    return save_pretrained


def _fp4_or(stock: Any, is_fp4: Callable[[Mapping[str, Any]], bool]) -> Any:
    """Our config class for the FP4 formats, which need no other package; transformers' own for the rest."""

    class Config(FP4Config):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            return (FP4Config if is_fp4(config_dict) else stock).from_dict(config_dict, *args, **kwargs)

    return Config


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    activations: ActivationFormat = "bf16",
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a directory or Hub name, dense or FP4; models of text and images, too, where they have no class for text alone.

    Args:
        model: a directory or `org/name`.
        dtype: of everything that is not packed; "auto" is the checkpoint's own, on every device; `halfbyte.device.model_dtype` says what is fast.
        device: where all of it goes.
        activations: see `set_activations`.

    Raises:
        CheckpointError, UnsupportedError: as the readers in `halfbyte.checkpoint`; nothing is left at random values.
            A directory without config.json; a device that is not there.
        InputError: as `set_activations`; no dtype of floats, no device.

    >>> from pathlib import Path
    >>> model, tokenizer = load(Path(halfbyte.__file__).parent / "demo_model")
    >>> model.config.model_type, tokenizer.vocab_size
    ('qwen3_moe', 2048)
    """
    check_activations(activations, "load")
    asked, place = _dtype_of(dtype), as_device(device, "load")
    Target.of(place)  # refuses other kinds of devices
    path = resolve_model(model)
    read_json(path / "config.json")
    is_causal = type(AutoConfig.from_pretrained(path)) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
    with on_default_stream(place):  # as transformers' threads are, which copy weights while others are converted
        loaded = auto.from_pretrained(path, dtype=asked, device_map={"": place})
    if isinstance(asked, torch.dtype) and getattr(loaded, "hf_quantizer", None) is None:
        _hold_in(loaded, asked)
    set_activations(loaded, activations)
    return loaded, AutoTokenizer.from_pretrained(path)


def _dtype_of(dtype: object) -> torch.dtype | Literal["auto"]:
    """Raises InputError for what is neither "auto" nor a dtype of floats, or its name."""
    asked = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if asked == "auto" or (isinstance(asked, torch.dtype) and asked.is_floating_point):
        return asked
    raise InputError("dtype does not fit", where="load", given=reprlib.repr(dtype), needed="'auto', or a dtype of floats")


def _hold_in(model: Any, dtype: torch.dtype) -> None:
    """Where a device has no use for FP8, transformers dequantises it, and then holds most of the model in bf16, whatever was asked for."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(dtype)


def set_activations(model: Any, activations: ActivationFormat) -> None:
    """Choose what the packed experts of `model` see of their inputs: "bf16" (as they come), "fp8", "nvfp4" or "mxfp8".

    Linear layers outside the experts always compute in the dtype of their input.

    Raises:
        InputError: no such format, or no packed experts that could see it.
    """
    check_activations(activations, "set_activations")
    check_type("set_activations", torch.nn.Module, model=model)
    states = [module.halfbyte for module in model.modules() if is_attached(module)]
    if activations != "bf16" and not states:
        raise InputError(
            "the model has no packed experts, which alone quantise activations",
            where="set_activations",
            given=repr(activations),
            needed="'bf16', or a model with FP4 experts",
            next_step="run: halfbyte quantize SRC DST",
        )
    for state in states:
        state.activations = activations


def set_layout(model: Any, layout: Literal["auto", "canonical"]) -> None:
    """Choose whether the packed experts of `model` may be rearranged, in the memory they have, for the kernels of their device.

    "auto", the default, does so at the first call on a GPU of compute capability 9.0 for activations that its kernels take. The experts' Parameters
    are then buffers; `state_dict()` still has their canonical tensors. "canonical" leaves them as they were loaded, and slower.

    Raises:
        InputError: no such layout.
    """
    check_name("layout", layout, ("auto", "canonical"), "set_layout")
    check_type("set_layout", torch.nn.Module, model=model)
    for module in model.modules():
        if is_attached(module):
            module.halfbyte.layout = layout
            if layout == "canonical":
                restore_canonical(module)


register()
