"""Opening a directory: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from safetensors.torch import save_file

from halfbyte.checkpoint import Checkpoint, resolve_model
from halfbyte.checkpoint.source import INDEX, read_header
from halfbyte.errors import CheckpointError, UnsupportedError

GATE = "model.layers.1.mlp.experts.0.gate_proj.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return cf.dense().write(tmp_path / "model", shards=3)


def test_a_name_that_is_too_long_is_no_model() -> None:
    with pytest.raises(CheckpointError, match="not a model directory: File name too long"):
        Checkpoint.open("x" * 300)


def test_names_shapes_and_files_come_from_headers_alone(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.checkpoint.source.safe_open", None)
    checkpoint = Checkpoint.open(sharded)
    assert list(checkpoint.names) == sorted(checkpoint.names) and len(checkpoint.names) == 10
    assert checkpoint.dtype_shape(GATE) == (torch.bfloat16, (cf.I, cf.H)) and checkpoint.info(GATE).nbytes == 2 * cf.I * cf.H
    assert checkpoint.file_of(GATE).name == json.loads((sharded / INDEX).read_text())["weight_map"][GATE]
    assert GATE in checkpoint and "nothing" not in checkpoint
    for method in (checkpoint.info, checkpoint.file_of, checkpoint.read):
        with pytest.raises(CheckpointError, match="missing tensor nothing"):
            method("nothing")


def test_header_dtypes_and_shapes_are_those_of_the_tensors_read(tmp_path: Path) -> None:
    tensors = {
        "e4m3": torch.zeros(3, 5, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "e8m0": torch.zeros(3, 5, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "fp4": torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4, dtype=torch.int64),
        **{str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in (torch.float64, torch.int8, torch.uint8, torch.int32, torch.bool, torch.float16)},
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for name in tensors:
        assert checkpoint.dtype_shape(name) == (checkpoint.read(name).dtype, tuple(checkpoint.read(name).shape)), name
        assert checkpoint.info(name).nbytes == tensors[name].nbytes


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def write_header(file: Path, header: dict | str) -> None:
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded)


def entry(**values: object) -> dict:
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **values}


def lengthen(file: Path, length: int) -> None:
    """A header that claims so many bytes, and a file that has them without taking room on the disk."""
    file.write_bytes(struct.pack("<Q", length))
    os.truncate(file, 8 + length)


def first_file(path: Path) -> Path:
    return path / "model-00001-of-00003.safetensors"


def edit_index(path: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "data truncated": (lambda p: cut(first_file(p), first_file(p).stat().st_size - 1), ["truncated", "00001-of-00003", "bytes; needed"]),
    "header truncated": (lambda p: cut(first_file(p), 100), ["truncated", "given 100 bytes"]),
    "empty file": (lambda p: cut(first_file(p), 0), ["truncated", "given 0 bytes"]),
    "no safetensors at all": (lambda p: first_file(p).write_bytes(struct.pack("<Q", 4) + b"junk"), ["damaged", "00001-of-00003"]),
    "header entry incomplete": (lambda p: write_header(first_file(p), {"a": {"dtype": "U8", "data_offsets": [0, 0]}}), ["damaged", "'shape'"]),
    "shard missing": (lambda p: first_file(p).unlink(), ["missing file", "named by model.safetensors.index.json", "00001-of-00003"]),
    "tensor missing": (
        lambda p: edit_index(p, lambda i: i["weight_map"].update(extra="model-00001-of-00003.safetensors")),
        ["tensor extra", "absent"],
    ),
    "a tensor in two files": (
        lambda p: (
            save_file({name: torch.zeros(1) for name in ("other", GATE)}, p / "more.safetensors"),
            edit_index(p, lambda i: i["weight_map"].update(other="more.safetensors")),
        ),
        [INDEX, f"two files hold tensor {GATE}", "-of-00003.safetensors and more.safetensors"],
    ),
    "index names a number": (lambda p: edit_index(p, lambda i: i["weight_map"].update({GATE: 3})), [INDEX, GATE, "given 3"]),
    "index names a list": (lambda p: edit_index(p, lambda i: i["weight_map"].update({GATE: ["a"]})), [INDEX, GATE, "given ['a']"]),
    "index names nothing": (lambda p: edit_index(p, lambda i: i["weight_map"].update({GATE: None})), [INDEX, GATE, "given None"]),
    "index leads upwards": (lambda p: edit_index(p, lambda i: i["weight_map"].update({GATE: "../x.safetensors"})), [INDEX, GATE, "../x"]),
    "index leads away": (lambda p: edit_index(p, lambda i: i["weight_map"].update({GATE: "/etc/passwd"})), [INDEX, GATE, "/etc/passwd"]),
    "index with a long name": (lambda p: edit_index(p, lambda i: i["weight_map"].update({GATE: "x" * 300})), [INDEX, GATE]),
    "index of brackets": (lambda p: (p / INDEX).write_text("[" * 100_000), ["not readable JSON", INDEX, "Download"]),
    "config of brackets": (lambda p: (p / "config.json").write_text("[" * 100_000), ["not readable JSON", "config.json"]),
    "config empty": (lambda p: (p / "config.json").write_text(""), ["not readable JSON", "config.json", "Download"]),
    "config not UTF-8": (lambda p: (p / "config.json").write_bytes(b"\xff{}"), ["not readable JSON", "config.json"]),
    "config a pipe": (lambda p: ((p / "config.json").unlink(), os.mkfifo(p / "config.json")), ["not a regular file", "config.json"]),
    "config a directory": (lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()), ["not a regular file", "config.json"]),
    "header of brackets": (lambda p: first_file(p).write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000), ["damaged", "too many levels"]),
    "header too long": (lambda p: lengthen(first_file(p), 100_000_001), ["header", "given 100000001", "at most 100000000"]),
    "shape of strings": (lambda p: write_header(first_file(p), {"a": entry(shape=["4"])}), ["damaged", "tensor a has shape ('4',)"]),
    "shape a string": (lambda p: write_header(first_file(p), {"a": entry(shape="4")}), ["damaged", "tensor a has shape"]),
    "shape nested": (lambda p: write_header(first_file(p), {"a": entry(shape=[[4]])}), ["damaged", "tensor a has shape"]),
    "shape negative": (lambda p: write_header(first_file(p), {"a": entry(shape=[-4, -1])}), ["damaged", "tensor a has shape"]),
    "shape true": (lambda p: write_header(first_file(p), {"a": entry(shape=[True, 4])}), ["damaged", "tensor a has shape"]),
    "shape of more than the bytes": (lambda p: write_header(first_file(p), {"a": entry(shape=[2**62])}), ["damaged", "has 4 bytes"]),
    "index without map": (lambda p: edit_index(p, lambda i: i.pop("weight_map")), ["no weight_map", INDEX]),
    "index no JSON": (lambda p: (p / INDEX).write_text("{"), ["not readable JSON", INDEX]),
    "index missing": (lambda p: (p / INDEX).unlink(), ["3 safetensors files but no", INDEX]),
    "a key twice in the config": (lambda p: (p / "config.json").write_text('{"a": 1, "a": 2}'), ["not readable JSON", "'a' is given twice"]),
    "half a surrogate pair": (lambda p: (p / "config.json").write_text('{"a": "\\ud800"}'), ["not readable JSON", "surrogates not allowed"]),
    "a config without end": (lambda p: cut(p / "config.json", 2**40), ["no description of a model is as long", "config.json"]),
    "a tensor twice": (lambda p: write_header(first_file(p), '{"a": 1, "a": 2}'), ["damaged", "'a' is given twice"]),
    "bytes of two tensors": (lambda p: write_header(first_file(p), {"a": entry(), "b": entry()}), ["damaged", "bytes 0 to 4 belong to two tensors"]),
    "bytes of no tensor": (lambda p: write_header(first_file(p), {"a": entry(data_offsets=[4, 8])}), ["damaged", "bytes 0 to 4 belong to no tensor"]),
    "bytes behind the tensors": (lambda p: first_file(p).write_bytes(first_file(p).read_bytes() + b"more"), ["bytes behind the last tensor"]),
    "metadata of numbers": (lambda p: write_header(first_file(p), {"__metadata__": {"a": 3}, "a": entry()}), ["damaged", "__metadata__"]),
    "config missing": (lambda p: (p / "config.json").unlink(), ["missing file", "config.json"]),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), ["not readable JSON", "a list, not an object"]),
}


@pytest.mark.parametrize(("damage", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_directories(sharded: Path, damage: Callable[[Path], object], said: list[str]) -> None:
    Checkpoint.open(sharded)
    damage(sharded)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(sharded)
    for text in (*said, str(sharded)):
        assert text in str(caught.value)


def test_damage_after_the_headers_were_read(sharded: Path) -> None:
    file = first_file(sharded)
    checkpoint = Checkpoint.open(sharded)
    file.write_bytes(file.read_bytes() + b"trailing")
    name = next(name for name in checkpoint.names if checkpoint.file_of(name) == file)
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        checkpoint.read(name)


def test_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no safetensors files"):
        Checkpoint.open(tmp_path)


def test_a_single_file_of_any_name_will_do(tmp_path: Path) -> None:
    path = cf.dense().write(tmp_path / "model")
    (path / "model.safetensors").rename(path / "weights.safetensors")
    assert Checkpoint.open(path).file_of(GATE).name == "weights.safetensors"


def test_unknown_tensor_dtype(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UnsupportedError, match=r"tensor a has a dtype .*given C64"):
        read_header(tmp_path / "x.safetensors")


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    for absent in (str(tmp_path / "absent"), "absent", "./absent"):
        with pytest.raises(CheckpointError, match="not a model directory"):
            resolve_model(absent)
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert resolve_model("org/name") == tmp_path

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"org/name: .*not in the cache.*HF_HUB_OFFLINE"):
        resolve_model("org/name")


def test_links_into_another_folder_are_followed(sharded: Path, tmp_path: Path) -> None:
    """As those of the Hub's cache are: a snapshot is links to blobs."""
    blob = tmp_path / "blob"
    first_file(sharded).rename(blob)
    first_file(sharded).symlink_to(blob)
    assert len(Checkpoint.open(sharded).names) == 10


def test_a_file_that_cannot_be_read(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot read the file: Permission denied"):
        read_header(first_file(sharded))


def test_one_part_of_several_is_no_model(tmp_path: Path) -> None:
    path = cf.dense().write(tmp_path / "model")
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"1 safetensors files but no model\.safetensors\.index\.json"):
        Checkpoint.open(path)
    (path / "model-00001-of-00002.safetensors").rename(path / "model-00001-of-00001.safetensors")
    assert GATE in Checkpoint.open(path)


def test_tensors_that_the_index_leaves_out_are_there(sharded: Path) -> None:
    """transformers reads whole files, too."""
    assert Checkpoint.open(sharded).unlisted == ()
    edit_index(sharded, lambda index: index["weight_map"].pop(GATE))
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.unlisted == (GATE,) and checkpoint.read(GATE).shape == (cf.I, cf.H) and len(checkpoint.names) == 10


@pytest.mark.parametrize("layers", [3, 65_536])
def test_no_more_layers_than_the_files_have(tmp_path: Path, layers: int) -> None:
    files = cf.nvfp4("modelopt")
    files.config["num_hidden_layers"] = layers
    with pytest.raises(CheckpointError, match=f"fewer layers in the files .given num_hidden_layers {layers}; needed at most 2"):
        _ = Checkpoint.open(files.write(tmp_path)).moe


@pytest.mark.parametrize("experts", [2, 4, 10**9])
@pytest.mark.parametrize("make", [lambda: cf.nvfp4("modelopt"), lambda: cf.gpt_oss()[0], lambda: cf.dense(stacked="rows")])
def test_as_many_experts_as_the_files_have(tmp_path: Path, make: Callable[[], cf.Files], experts: int) -> None:
    files = make()
    files.config |= {"num_experts": experts, "num_local_experts": experts}
    with pytest.raises(CheckpointError, match=f"another number of experts in the files .given .*{experts}; .*needed 3"):
        _ = Checkpoint.open(files.write(tmp_path)).moe


@pytest.mark.parametrize("number", ["02", "00000000000000000002", "99999999999999999999"])
def test_experts_have_plain_numbers(tmp_path: Path, number: str) -> None:
    files = cf.nvfp4("modelopt")
    files.tensors = {name.replace("experts.2", f"experts.{number}"): tensor for name, tensor in files.tensors.items()}
    with pytest.raises(CheckpointError, match=rf"no number of a layer or an expert .given .*experts\.{number}"):
        _ = Checkpoint.open(files.write(tmp_path)).moe
