"""Bytes through a file, and what the checksum finds."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from helpers import assert_equal_bits
from safetensors.torch import load_file, save_file

from halfbyte.errors import CheckpointError
from halfbyte.loading import tensor_files
from halfbyte.loading.tensor_files import TensorFile, checksums, write_tensors


def make_tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "codes": torch.randint(0, 256, (3, 5000), dtype=torch.uint8, generator=random),
        "words": torch.randint(-(1 << 31), 1 << 31, (4, 512), dtype=torch.int32, generator=random),
        "scales": torch.rand((7, 3), generator=random).to(torch.float8_e4m3fn),
        "multiplier": torch.rand((3, 2), generator=random),
        "bias": torch.rand((1,), generator=random).bfloat16(),
        "none": torch.empty((0, 4), dtype=torch.int64),
    }


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    with path.open("wb", buffering=0) as stream:
        write_tensors(stream, tensors, {"format": "pt", "made by": "test"})
    return path


def test_checksum_by_its_definition() -> None:
    for name, tensor in make_tensors().items():
        data = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        data += bytes(-len(data) % 4096)
        pages = [data[start : start + 4096] for start in range(0, len(data), 4096)]
        sums = [sum(int.from_bytes(page[at : at + 8], "little") for at in range(0, 4096, 8)) % 2**64 for page in pages]
        expected = zlib.crc32(b"".join(total.to_bytes(8, "little") for total in sums))
        assert checksums({name: tensor}) == {name: f"{expected:08x}"}


@pytest.mark.parametrize("block", [4096, 8 << 20])
def test_round_trip(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", block)
    tensors = make_tensors()
    path = written(tmp_path / "a", tensors)
    for name, tensor in load_file(path).items():  # the public reader agrees
        assert_equal_bits(tensor, tensors[name])
    file = TensorFile.open(path)
    assert file.metadata == {"format": "pt", "made by": "test"}
    places = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    file.check_holds(places)
    assert file.read_into(places) == checksums(tensors)
    for name, tensor in tensors.items():
        assert_equal_bits(places[name], tensor)


def test_every_flipped_bit_of_a_page_and_exchanged_pages_are_found() -> None:
    data = torch.randint(0, 256, (3 * 4096 + 100,), dtype=torch.uint8)
    whole = checksums({"": data})
    for position in [*range(0, 4096, 509), 4096, 12287, 12288, 12387]:
        for bit in range(8):
            damaged = data.clone()
            damaged[position] ^= 1 << bit
            assert checksums({"": damaged}) != whole
    pages = list(data.split(4096))
    assert checksums({"": torch.cat([pages[1], pages[0], *pages[2:]])}) != whole
    assert checksums({"": torch.cat([torch.zeros_like(pages[0]), *pages[1:]])}) != whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b""), "truncated safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "truncated safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated file"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "goes on behind its tensors"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtype;', 1)), "damaged safetensors header"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"I32"', b'"F32"', 1)), "tensor words is not what it should be"),
        (lambda path: save_file({"other": torch.zeros(2)}, path), "missing tensor"),
        (lambda path: path.unlink(), "missing file"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "damaged safetensors header"),
        (lambda path: path.write_bytes((20).to_bytes(8, "little") + b'{"__metadata__": 17}'), "damaged safetensors header"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: object, message: str) -> None:
    tensors = make_tensors()
    path = written(tmp_path / "a", tensors)
    change(path)
    with pytest.raises(CheckpointError, match=message):
        TensorFile.open(path).check_holds(tensors)


def test_a_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    tensors = make_tensors()
    path = written(tmp_path / "a", tensors)
    file = TensorFile.open(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="the file ends early"):
        file.read_into(tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_round_trip_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 64 << 10)
    tensors = {"many blocks": torch.randint(0, 256, (5_000_001,), dtype=torch.uint8), **make_tensors()}
    on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
    assert checksums(on_gpu) == checksums(tensors)
    path = written(tmp_path / "a", on_gpu)
    assert path.read_bytes() == written(tmp_path / "b", tensors).read_bytes()
    places = {name: torch.empty_like(tensor) for name, tensor in on_gpu.items()}
    assert TensorFile.open(path).read_into(places) == checksums(tensors)
    for name, tensor in tensors.items():
        assert_equal_bits(places[name].cpu(), tensor)
