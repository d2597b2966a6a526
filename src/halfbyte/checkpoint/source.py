"""`Checkpoint`: a directory of safetensors files. Opening reads headers only; tensors are memory-mapped one at a time."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.arguments import check_type
from halfbyte.checkpoint.families import MoEConfig, describe_moe, find_experts, is_known
from halfbyte.checkpoint.families.counts import check_counts
from halfbyte.checkpoint.families.unknown import describe_unknown
from halfbyte.checkpoint.fingerprint import fingerprint
from halfbyte.checkpoint.json_files import AGAIN, damaged_header, read_header_of, read_json, wrong_length
from halfbyte.checkpoint.quantization import Quantization, describe_quantization
from halfbyte.env import expanded
from halfbyte.errors import CheckpointError, UnsupportedError, reason_of

_SHARD = re.compile(r"-0*[1-9]\d*-of-(?!0*1\.)\d+\.safetensors$")  # a part of several, not the only one
DEMO_MODEL = "demo"  # the model inside this package, wherever a model is asked for; a directory of that name comes first
INDEX = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """What the header says of one tensor. `shape` is that of the torch tensor: packed FP4 counts bytes, not elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def demo_model_dir() -> Path:
    """Return the directory of the embedded model: bf16 checkpoint, tokenizer, eval.jsonl, heldout.txt.xz and its card.

    >>> sorted(file.name for file in demo_model_dir().glob("*.json*"))[:2]
    ['config.json', 'eval.jsonl']
    """
    return Path(__file__).parents[1] / "demo_model"


def resolve_model(model: str | Path) -> Path:
    """Return the directory of a model: `model` itself when it is one, "demo" for the embedded model, else a snapshot of the Hub's `org/name`.

    Honours HF_HOME and HF_HUB_OFFLINE.

    Raises:
        InputError: `model` is no path, or that of a user who has no home.
        CheckpointError: no such directory, or the download failed.
        UnsupportedError: a Hub name, but huggingface_hub is not installed.
    """
    check_type("model", (str, os.PathLike), model=model)
    path = expanded(model)
    try:
        if path.is_dir():
            return path
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"not a model directory: {error.strerror}", where=str(model), needed="a directory, or a Hub name org/name") from error
    if model == DEMO_MODEL:
        return demo_model_dir()
    if path.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise CheckpointError("not a model directory", where=str(model), needed="a directory with config.json, or a Hub name org/name")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise UnsupportedError(
            "cannot download a model: huggingface_hub is not installed", where=str(model), next_step="run: pip install 'halfbyte[hf]'"
        ) from error
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason, step = reason_of(error), "check the name, the network and HF_HUB_OFFLINE"
        raise CheckpointError(f"no such directory, and the download failed: {reason}", where=str(model), next_step=step) from error


class Checkpoint:
    """A model directory: `config`, and every tensor by name.

    Attributes:
        path: the directory.
        config: config.json as a dict.
        names: tensor names, sorted.
        unlisted: those among them that the index leaves out, though a file that it names has them.
        moe: `MoEConfig` of the model; quantization: `Quantization`. Both raise UnsupportedError for what halfbyte does not read.

    >>> from pathlib import Path
    >>> demo = Path(halfbyte.__file__).parent / "demo_model"
    >>> checkpoint = Checkpoint.open(demo)
    >>> checkpoint.info("model.embed_tokens.weight").shape
    (2048, 256)
    >>> checkpoint.moe.num_experts, checkpoint.quantization.kind
    (16, 'dense')
    """

    def __init__(
        self, path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo], files: Mapping[str, Path], unlisted: tuple[str, ...] = ()
    ):
        """Use `Checkpoint.open`, which also checks what it is given."""
        self.path = path
        self.config = config
        self.names = tuple(sorted(tensors))
        self.unlisted = unlisted
        self._tensors = tensors
        self._files = files
        self._open_files: dict[Path, Any] = {}

    @classmethod
    def open(cls, model_dir: str | Path) -> Checkpoint:
        """Read config.json, the index and all headers of a directory (or Hub name); no tensor data.

        Raises:
            CheckpointError: no config or no safetensors, a truncated or damaged file, an index that names an absent file or tensor.
        """
        path = resolve_model(model_dir)
        config = read_json(path / "config.json")
        index = path / INDEX
        if not index.exists():
            file = _only_file(path)
            tensors = read_header(file)
            return cls(path, config, tensors, dict.fromkeys(tensors, file))
        weight_map = _weight_map(index)
        headers = {name: read_header(path / name, named_by=index) for name in sorted(set(weight_map.values()))}
        for name, file_name in weight_map.items():
            if name not in headers[file_name]:
                raise CheckpointError(
                    f"the index places tensor {name} here, but it is absent", where=str(path / file_name), next_step="download the model again"
                )
        check_one_home(headers, str(index))
        unlisted = {name: file_name for file_name, header in headers.items() for name in header if name not in weight_map}
        files = weight_map | unlisted
        return cls(
            path,
            config,
            {name: headers[file_name][name] for name, file_name in files.items()},
            {name: path / file_name for name, file_name in files.items()},
            tuple(sorted(unlisted)),
        )

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and size of a tensor, from the header.

        Raises:
            CheckpointError: no tensor of that name.
            InputError: no name.
        """
        check_type("Checkpoint", str, name=name)
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"missing tensor {name}", where=str(self.path), given=f"{len(self.names)} other tensors") from None

    def dtype_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor, from the header."""
        info = self.info(name)
        return info.dtype, info.shape

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        self.info(name)
        return self._files[name]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of the memory-mapped file: nothing is copied until its elements are used. Do not write to it."""
        file = self.file_of(name)
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"damaged safetensors file: {error}", where=str(file), next_step="download the file again") from error
        return self._open_files[file].get_tensor(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the files do: see `checkpoint.fingerprint`."""
        return fingerprint(self.path, set(self._files.values()))

    @cached_property
    def moe(self) -> MoEConfig:
        where = str(self.path / "config.json")
        shapes, found = {name: info.shape for name, info in self._tensors.items()}, find_experts(self.names)
        if not is_known(self.config, where):
            return describe_unknown(self.config, found, shapes, self.quantization, where=where)
        moe = describe_moe(self.config, found, where=where)
        check_counts(moe, found, shapes, where)
        return moe

    @cached_property
    def quantization(self) -> Quantization:
        modelopt = self.path / "hf_quant_config.json"
        return describe_quantization(self.config, read_json(modelopt) if modelopt.exists() else None, where=str(self.path))


def check_one_home(headers: Mapping[str, Mapping[str, TensorInfo]], where: str) -> None:
    """Raise CheckpointError for a tensor that two files have: each reader would take another one. `headers` by file name."""
    home: dict[str, str] = {}
    for file_name, header in headers.items():
        for name in header.keys() & home.keys():
            raise CheckpointError(
                f"two files hold tensor {name}",
                where=where,
                given=f"{home[name]} and {file_name}",
                next_step="download the model again, or remove what belongs to another one",
            )
        home |= dict.fromkeys(header, file_name)


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor. They lead nowhere but into the directory; a link that lies there may lead out, as those of the Hub's cache do."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError("the index has no weight_map", where=str(index), next_step=AGAIN)
    for name, file_name in weight_map.items():
        parts = file_name.split("/") if isinstance(file_name, str) else ["."]
        if not {"", ".", ".."}.isdisjoint(parts) or "\\" in file_name or "\0" in file_name or len(file_name.encode()) > 255:
            raise CheckpointError(
                f"the index does not name a file of the directory for tensor {name}",
                where=str(index),
                given=reprlib.repr(file_name),
                needed="a file name such as model-00001-of-00002.safetensors",
                next_step=AGAIN,
            )
    return weight_map


def read_header(file: Path, *, named_by: Path | None = None) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file and check that the file is as long as the header says.

    Raises:
        CheckpointError: absent, unreadable, truncated, or no safetensors file.
        UnsupportedError: a tensor of a dtype halfbyte does not know.
    """
    if not file.is_file():
        named = f", named by {named_by.name}" if named_by else ""
        raise CheckpointError(f"missing file{named}", where=str(file), next_step="download the model again")
    header = read_header_of(file)
    try:
        tensors = {name: _tensor_info(file, name, entry) for name, entry in header.entries.items()}
        end = header.data_start + _end_of_data([entry["data_offsets"] for entry in header.entries.values()])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise damaged_header(file, repr(error)) from error
    if header.size != end:
        raise wrong_length(file, header.size, end)
    return tensors


def _end_of_data(places: list[tuple[int, int]]) -> int:
    """The end of the last of these (first, end), which lie one after the other without a gap: each byte belongs to one tensor."""
    end = 0
    for first, next_end in sorted(places):
        if first != end:
            raise ValueError(f"bytes {min(first, end)} to {max(first, end)} belong to {'no tensor' if first > end else 'two tensors'}")
        end = next_end
    return end


def _tensor_info(file: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    stored, shape, (first, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    dtype = SAFETENSORS_DTYPES.get(stored)
    if dtype is None:
        raise UnsupportedError(
            f"tensor {name} has a dtype halfbyte does not know", where=str(file), given=stored, needed=", ".join(SAFETENSORS_DTYPES)
        )
    for number in (*shape, first, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"tensor {name} has shape {shape} and bytes {first} to {end}")
    if stored == "F4":
        *leading, last = shape or (2,)
        shape = (*leading, last // 2)
    if math.prod(shape) * dtype.itemsize != end - first:
        raise ValueError(f"tensor {name}, {stored} {shape}, has {end - first} bytes")
    return TensorInfo(dtype, shape, end - first)


def _only_file(path: Path) -> Path:
    """The single safetensors file of a directory without index."""
    usual = path / "model.safetensors"
    if usual.exists():
        return usual
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not _SHARD.search(files[0].name):
        return files[0]
    if files:
        raise CheckpointError(f"{len(files)} safetensors files but no {INDEX}", where=str(path), next_step="download the index too")
    raise CheckpointError("no safetensors files", where=str(path), next_step="convert other weights with transformers: model.save_pretrained(DIR)")
