"""`save_pretrained` of a packed model: a checkpoint in the dialect, layout and names it was loaded from.

Packed tensors go back module by module as their file is written, so that memory holds one file more than the model. Everything else goes back
through transformers' own conversions, reversed. What the model has no tensors for is not written: layers that predict several tokens.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils.hub import convert_file_size_to_int

from halfbyte.arguments import dtype_name
from halfbyte.checkpoint.source import INDEX, TensorInfo
from halfbyte.checkpoint.writer import make_directory, plan_shards, replacing, shard_name
from halfbyte.errors import CheckpointError, InputError, UnsupportedError
from halfbyte.formats import e8m0, encode_scale_from_decode
from halfbyte.integrations.packing import canonical_parameters, is_attached, packed_tensors
from halfbyte.integrations.transformers.conversion import LoadPlan, Recipe, alternating_from_halves
from halfbyte.integrations.transformers.stored import BLOCK_SCALE, CODES, GLOBAL_SCALE, INPUT_SCALE, Stored, parameter_dtype

Tensors = dict[str, torch.Tensor]
Part = tuple[int, Callable[[], Tensors]]  # tensors that go into one file: their bytes, and what makes them


def save_packed(stock: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    """What `save_pretrained` (`stock`) does of a model that halfbyte's quantizer loaded; arguments are those of `stock`.

    Raises:
        UnsupportedError: an argument that does not go with packed tensors, or a layer that cannot be written as it was; nothing is written.
        InputError: `max_shard_size` is no size.
        CheckpointError: the directory holds weights, which are never overwritten, or cannot be written.
    """
    directory, max_bytes = _arguments(stock, model, args, kwargs)
    if directory is None:
        return
    plan: LoadPlan = model.hf_quantizer.plan
    _check_free(directory)
    modules = _packed_modules(model, plan)
    others = _unpacked_tensors(model, plan) | plan.kept
    parts: list[Part] = [(tensor.nbytes, partial(dict, [(name, tensor)])) for name, tensor in others.items()]
    for name, recipes in modules.items():
        nbytes = sum(plan.headers[stored].nbytes for recipe in recipes.values() for stored in recipe.stored_names)
        parts.append((nbytes, partial(_module_tensors, model, name, recipes, plan)))
    with TemporaryDirectory() as configs:
        _write_configs(Path(configs), model)  # which transformers may refuse
        make_directory(directory)
        _write_shards(directory, parts, max_bytes)
        for file in sorted(Path(configs).iterdir(), key=lambda file: file.name == "config.json"):  # last: a directory that loads is a complete one
            with replacing(directory / file.name) as whole:
                shutil.copyfile(file, whole)


def _arguments(stock: Callable[..., None], model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Path | None, int]:
    """The directory, None where another process writes, and the largest size of a file."""
    signature = inspect.signature(stock)
    bound = signature.bind(model, *args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    _, directory, is_main, size = (given.pop(name) for name in ("self", "save_directory", "is_main_process", "max_shard_size"))
    for name, value in given.items():
        parameter = signature.parameters[name]
        if value != ({} if parameter.kind is parameter.VAR_KEYWORD else parameter.default):
            raise UnsupportedError(
                "a packed model cannot be saved with this argument",
                where="save_pretrained",
                given=f"{name}={value!r}" if not isinstance(value, dict) else f"{name} of {len(value)} entries",
                needed="save_directory, max_shard_size, is_main_process",
                next_step="to publish it, call model.push_to_hub(NAME)",
            )
    return (Path(directory) if is_main else None), _parse_bytes(size)


def _parse_bytes(size: int | str) -> int:
    try:
        return int(convert_file_size_to_int(size))
    except ValueError as error:
        raise InputError("not a size", where="max_shard_size", given=repr(size), needed="a number of bytes, or such as '5GB'") from error


def _check_free(directory: Path) -> None:
    held = sorted(file.name for pattern in ("*.safetensors", "*.index.json", "*.bin") for file in directory.glob(pattern))
    if held or directory.is_file():
        raise CheckpointError(
            "the destination holds weights, which are never overwritten",
            where=str(directory),
            given=held[0] if held else "a file",
            needed="a new directory",
            next_step="choose another destination, or remove this one",
        )


def _packed_modules(model: Any, plan: LoadPlan) -> dict[str, dict[str, Recipe]]:
    """The recipes of every packed module, by the names of its Parameters.

    Raises:
        UnsupportedError: a layer that was dequantised as it was loaded, Parameters that were cast, or scalars that the layout cannot tell apart.
    """
    modules: dict[str, dict[str, Recipe]] = defaultdict(dict)
    for target, recipe in plan.recipes.items():
        module_name, _, name = target.rpartition(".")
        stored = recipe.parameter.first
        if recipe.role is None:
            raise UnsupportedError(
                "this layer was FP8 in the files and is dense in the model, so that it cannot be written as it was",
                where=target,
                given=stored.stem,
                next_step="copy the files of the checkpoint instead",
            )
        modules[module_name][name] = recipe
        module = model.get_submodule(module_name)
        if is_attached(module) and module.halfbyte.parallel is not None:
            raise UnsupportedError("a rank holds its own experts only and cannot save the model", where=module_name)
        if is_attached(module) and name in module.halfbyte.replaced:
            packed_tensors(module)  # raises where they were cast
            continue
        dtype = module.get_parameter(name).dtype
        if dtype != parameter_dtype(recipe.role, stored.dialect.format):
            raise UnsupportedError(
                "packed tensors that were cast cannot be saved",
                where=target,
                given=dtype,
                needed=parameter_dtype(recipe.role, stored.dialect.format),
                next_step="load the model again",
            )
        if recipe.role in (GLOBAL_SCALE, INPUT_SCALE):
            list(stored_tensors(recipe, _value(model, target), plan.headers))
    return modules


def _module_tensors(model: Any, module_name: str, recipes: Mapping[str, Recipe], plan: LoadPlan) -> Tensors:
    """The tensors of one packed module as they are in files."""
    module = model.get_submodule(module_name)
    packed = canonical_parameters(module) if is_attached(module) else {}
    tensors: Tensors = {}
    for name, recipe in recipes.items():
        value = packed[name] if name in packed else _value(model, f"{module_name}.{name}")
        tensors |= stored_tensors(recipe, value, plan.headers)
    return tensors


def stored_tensors(recipe: Recipe, tensor: torch.Tensor, headers: Mapping[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the files, by name, that `recipe` makes into `tensor`; those that were missing are missing again.

    Raises:
        UnsupportedError: the files have one scalar for what has come to have several.
    """
    role, parameter = recipe.role, recipe.parameter
    assert role is not None
    is_scalar = role in (GLOBAL_SCALE, INPUT_SCALE)
    if recipe.experts and parameter.merges_experts:
        parts = tensor.reshape(recipe.experts, recipe.parts) if is_scalar else tensor.unflatten(1, (recipe.parts, -1))
        pieces = {place: parts[place] for place, _ in recipe.matrices}
    elif recipe.experts:
        stacked = tensor.reshape(recipe.experts, -1) if is_scalar else tensor
        halves = stacked.chunk(len(parameter.places), dim=1)
        pieces = dict(zip(sorted(parameter.places), halves, strict=True))
    else:
        pieces = {(0, 0): tensor}
    for place, stored in recipe.matrices:
        if role in stored.tensors:
            name = stored.tensors[role]
            yield name, _as_stored(recipe, stored, pieces[place], name, headers[name])


def _as_stored(recipe: Recipe, matrix: Stored, tensor: torch.Tensor, name: str, info: TensorInfo) -> torch.Tensor:
    """One tensor of a file: the inverse of `_Arriving.take` and `_as_canonical`."""
    role, dialect = recipe.role, matrix.dialect
    if role in (GLOBAL_SCALE, INPUT_SCALE):
        count = math.prod(info.shape)
        columns = tensor.reshape(1 if tensor.numel() == 1 else recipe.experts, -1)
        kept = columns if count == columns.numel() else columns[:, :1] if count == len(columns) else columns[:1, :1]
        if not bool((columns == kept).all()):
            raise UnsupportedError(
                "one scalar of the files has become several", where=name, given=columns.flatten()[:4].tolist(), needed="equal values"
            )
        scalars = encode_scale_from_decode(kept) if dialect.encode else kept
        return scalars.to(info.dtype).reshape(info.shape)
    if recipe.alternating:
        tensor = alternating_from_halves(tensor, dim=1)
    if recipe.transposed:
        tensor = tensor.transpose(1, 2)
    if role == CODES or (role == BLOCK_SCALE and dialect.format is not None):
        stored = e8m0.decode(tensor) if info.dtype == torch.float32 else tensor.contiguous().view(info.dtype)
    else:
        stored = tensor.to(info.dtype)
    return stored.reshape(info.shape)


def _unpacked_tensors(model: Any, plan: LoadPlan) -> Tensors:
    """Everything that is not packed, by the names that it has in files."""
    state = {name: model.get_parameter_or_buffer(name).detach() for name in plan.others if name not in (model._keys_to_ignore_on_save or ())}
    state = remove_tied_weights_from_state_dict(state, model)
    reverted = revert_weight_conversion(model, {name: _value(model, name) for name in state})
    # Transformers adds the prefix of a base model on loading, and some names of other versions, but does not take them away again.
    packed = {name for recipe in plan.recipes.values() for name in recipe.stored_names}
    files = {plan.names.key(name): name for name in plan.headers if name not in packed}
    return {name if name in plan.headers else files.get(plan.names.key(name), name): tensor for name, tensor in reverted.items()}


def _value(model: Any, name: str) -> torch.Tensor:
    """A parameter or buffer, from where accelerate keeps it."""
    tensor = model.get_parameter_or_buffer(name).detach()
    return load_offloaded_parameter(model, name) if tensor.device.type == "meta" else tensor


def _write_shards(directory: Path, parts: list[Part], max_bytes: int) -> None:
    shards = plan_shards([nbytes for nbytes, _ in parts], max_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for index, shard in enumerate(shards):
        name = shard_name(index, len(shards)) if len(shards) > 1 else "model.safetensors"
        tensors = {key: tensor.cpu().contiguous() for part in shard for key, tensor in parts[part][1]().items()}
        with replacing(directory / name) as whole:
            save_file(tensors, whole, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_configs(directory: Path, model: Any) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = dtype_name(model.dtype)
    config.architectures = [type(model).__name__]
    described = model.hf_quantizer.hf_quant_config
    if described is not None:
        _write_json(directory / "hf_quant_config.json", described)
    if "quantization" in config.quantization_config.to_dict():  # which no config.json had: see `_add_hf_quant_config`
        del config.quantization_config
    if model.is_remote_code():
        custom_object_save(model, directory, config=config)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    config.save_pretrained(directory)


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    with replacing(file) as whole:
        whole.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
