"""The tensors of one safetensors file, written from and read into memory that is there already, on any device, at the speed of the disk.

Every tensor has a checksum: the CRC-32 of one sum for each 4 KiB page of its bytes, the sum (modulo 2^64) of the page's 512 little-endian words of 64
bits. A CRC over all bytes runs at 4 GB/s on a core, a cryptographic hash at 1 or 2 (zlib 1.2.13, OpenSSL 3, an EPYC, 2026-11-25): less than disks and
PCIe deliver. Page sums run at 20 GB/s on a core and, on a GPU, after the copy and so including it. So every load verifies every byte.
Found is any change of one word, or of several unless their sums cancel, and pages that are lost, zeroed or in each other's place. Not found are words
that changed places inside a page, which no disk does; and it is no protection against somebody who means harm.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from halfbyte.checkpoint.json_files import read_header_of
from halfbyte.checkpoint.source import SAFETENSORS_DTYPES
from halfbyte.errors import CheckpointError

PAGE_BYTES = 4096
_BLOCK_BYTES = 8 << 20  # a multiple of a page; read, copied and summed at a time
_THREADS = 4  # one does not keep an NVMe drive, or the copy out of the page cache, busy
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The checksum of every tensor, 8 hexadecimal digits, computed where the tensor lies.

    >>> checksums({"w": torch.arange(6)})
    {'w': 'bc02cdc5'}
    """
    return {name: _digest([_page_sums(_bytes_of(tensor))]) for name, tensor in tensors.items()}


def write_tensors(stream: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; a tensor that is not on the CPU goes through a buffer of 8 MiB."""
    header = json.dumps({"__metadata__": dict(metadata), **_entries(tensors)}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    _write(stream, memoryview(struct.pack("<Q", len(header)) + header))
    for tensor in tensors.values():
        for block in _bytes_of(tensor).split(_BLOCK_BYTES):
            host = block.cpu()  # named: the memory lives as long as the tensor
            _write(stream, memory_of(host))


@dataclass(frozen=True)
class TensorFile:
    """A file whose header has been read: `metadata`, and where its data begin."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, dict[str, Any]]
    data_start: int
    size: int

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header.

        Raises:
            CheckpointError: no readable safetensors header.
        """
        header = read_header_of(path, next_step="")
        return cls(path, header.metadata, header.entries, header.data_start, header.size)

    def check_holds(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compare names, dtypes, shapes and the file's length with `tensors` ("meta" will do).

        Raises:
            CheckpointError: they differ.
        """
        expected = _entries(tensors)
        for name in sorted({*expected, *self.entries}):
            if self.entries.get(name) != expected.get(name):
                problem = f"missing tensor {name}" if name not in self.entries else f"tensor {name} is not what it should be"
                raise CheckpointError(problem, where=str(self.path), given=self.entries.get(name), needed=expected.get(name))
        needed = self.data_start + sum(tensor.nbytes for tensor in tensors.values())
        if self.size != needed:
            problem = "truncated file" if self.size < needed else "the file goes on behind its tensors"
            raise CheckpointError(problem, where=str(self.path), given=f"{self.size} bytes", needed=f"{needed} bytes")

    def read_into(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Read every tensor into its place, and return the checksums of what arrived there. Call `check_holds` before.

        Raises:
            CheckpointError: the file cannot be read.
        """
        blocks = list(self._blocks(tensors))
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        copier = _PinnedCopier(device) if device.type == "cuda" else None
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                with ThreadPoolExecutor(_THREADS, "halfbyte-read") as pool:

                    def read(block: _Block) -> torch.Tensor:
                        if copier is not None:
                            return copier.read(descriptor, block)
                        _read_exactly(descriptor, block.place, block.offset)
                        return _page_sums(block.place)

                    sums = list(pool.map(read, blocks))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read the file: {error}", where=str(self.path)) from error
        finally:
            if copier is not None:
                copier.finish()  # after an error too: no copy may arrive in memory that has gone to somebody else
        return {name: _digest([part for block, part in zip(blocks, sums, strict=True) if block.name == name]) for name in tensors}

    def _blocks(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[_Block]:
        for name, tensor in tensors.items():
            offset = self.data_start + self.entries[name]["data_offsets"][0]
            for place in _bytes_of(tensor).split(_BLOCK_BYTES):
                yield _Block(name, place, offset)
                offset += place.nbytes


@dataclass(frozen=True)
class _Block:
    """A part of a tensor, uint8, and where it is in the file."""

    name: str
    place: torch.Tensor
    offset: int


class _PinnedCopier:
    """Reads blocks, in several threads, into pinned buffers, and copies them to a GPU on a stream of its own."""

    def __init__(self, device: torch.device):
        with torch.cuda.device(device):
            self._current, self._copies = torch.cuda.current_stream(), torch.cuda.Stream()
        self._copies.wait_stream(self._current)  # the memory may have been another tensor's a moment ago
        # Twice as many as threads: a thread finds one whose copy is done. First in, first out, so it is the oldest copy.
        self._free: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        for _ in range(2 * _THREADS):
            self._free.put((torch.empty(_BLOCK_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))

    def read(self, descriptor: int, block: _Block) -> torch.Tensor:
        buffer, copied = self._free.get()
        try:
            copied.synchronize()
            buffered = buffer[: block.place.nbytes]
            _read_exactly(descriptor, buffered, block.offset)
            with torch.cuda.stream(self._copies):
                block.place.copy_(buffered, non_blocking=True)
                copied.record()
                return _page_sums(block.place)
        finally:
            self._free.put((buffer, copied))

    def finish(self) -> None:
        self._copies.synchronize()


def _entries(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """What a safetensors header says of `tensors`, which follow each other without gaps."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    return entries


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a contiguous tensor, uint8 [n], sharing storage."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8)


def _page_sums(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n] to int64 [ceil(n / 4096)]."""
    assert sys.byteorder == "little"
    whole = len(data) // PAGE_BYTES * PAGE_BYTES
    sums = data[:whole].view(torch.int64).view(-1, PAGE_BYTES // 8).sum(1)
    if whole == len(data):
        return sums
    last = torch.nn.functional.pad(data[whole:], (0, PAGE_BYTES - (len(data) - whole)))
    return torch.cat([sums, last.view(torch.int64).sum(0, keepdim=True)])


def _digest(sums: list[torch.Tensor]) -> str:
    crc = 0
    for part in sums:
        host = part.cpu()  # named: the memory lives as long as the tensor
        crc = zlib.crc32(memory_of(host), crc)
    return f"{crc:08x}"


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, while the tensor lives (torch's own way to it, numpy, need not be installed)."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B") if tensor.nbytes else memoryview(b"")


def _read_exactly(descriptor: int, place: torch.Tensor, offset: int) -> None:
    memory, done = memory_of(place), 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            raise OSError("the file ends early")
        done += count


def _write(stream: BinaryIO, memory: memoryview) -> None:
    while len(memory):
        memory = memory[stream.write(memory) :]
