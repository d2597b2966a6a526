"""Prepared experts on disk: one safetensors file per layer, taken only when it is exactly what would be prepared now.

    CACHE_DIR/prepared/{model}-{digest of its path}/{layout}-{policy}-{arch}/layer-00003.experts-0-128.safetensors

A file appears under its name when it is complete and synced to disk. Two processes that prepare the same layer write equal files, each under a
temporary name of its own, and the later one takes the place of the earlier. What a killed process leaves is removed by a later one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.checkpoint.source import Checkpoint
from halfbyte.checkpoint.writer import PARTIAL, make_directory, replacing
from halfbyte.env import cache_dir
from halfbyte.errors import CheckpointError
from halfbyte.loading.tensor_files import TensorFile, checksums, write_tensors
from halfbyte.version import __version__

_ABANDONED_AFTER_S = 3600  # a process that lives writes to its file all the time


@dataclass(frozen=True)
class CacheEntry:
    """The place of one layer's prepared experts.

    Attributes:
        file: where they are, or would be.
        made_from: what the file must say of itself: checkpoint, layer, experts, layout, policy, arch, halfbyte version.
    """

    file: Path
    made_from: dict[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: int, experts: range, layout: str, policy: str, arch: str, directory: Path | None = None) -> CacheEntry:
        """The entry of these experts under `directory`, by default that of HALFBYTE_CACHE_DIR."""
        path = checkpoint.path.resolve()
        model = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        name = f"layer-{layer:05d}.experts-{experts.start}-{experts.stop}.safetensors"
        made_from = {
            "halfbyte": __version__,
            "checkpoint": checkpoint.fingerprint,
            "layer": str(layer),
            "experts": f"{experts.start}:{experts.stop}",
            "layout": layout,
            "policy": policy,
            "arch": arch,
        }
        return cls((directory or cache_dir()) / "prepared" / model / f"{layout}-{policy}-{arch}" / name, made_from)

    def exists(self) -> bool:
        """Whether there is something under the name of the file.

        Raises:
            CheckpointError: its directory cannot be read.
        """
        try:
            return self.file.exists()
        except OSError as error:
            raise CheckpointError("cannot look into the cache", where=str(self.file.parent), given=error.strerror) from error

    def check(self, tensors: Mapping[str, torch.Tensor]) -> TensorFile:
        """Read the header and compare all it says with what is wanted; `tensors` may be on "meta".

        Raises:
            CheckpointError: what is wrong with the file.
        """
        file = TensorFile.open(self.file)
        for key, needed in self.made_from.items():
            if file.metadata.get(key) != needed:
                raise CheckpointError(f"made from another {key}", where=str(self.file), given=file.metadata.get(key), needed=needed)
        file.check_holds(tensors)
        return file

    def load_into(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read every tensor into its place and verify every byte.

        Raises:
            CheckpointError: what is wrong with the file; the tensors then hold anything.
        """
        file = self.check(tensors)
        arrived = file.read_into(tensors)
        damaged = [name for name, checksum in arrived.items() if file.metadata.get(f"checksum.{name}") != checksum]
        if damaged:
            raise CheckpointError(f"damaged: the checksums of {', '.join(damaged)} differ", where=str(self.file))

    def save(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the file.

        Raises:
            CheckpointError: the disk is full or the directory cannot be written; nothing is left behind.
        """
        make_directory(self.file.parent)
        self._remove_abandoned()
        metadata = {"format": "pt", **self.made_from, **{f"checksum.{name}": checksum for name, checksum in checksums(tensors).items()}}
        with replacing(self.file) as partial, partial.open("wb", buffering=0) as stream:
            write_tensors(stream, tensors, metadata)

    def _remove_abandoned(self) -> None:
        for partial in self.file.parent.glob(f"*{PARTIAL}"):
            try:
                if time.time() - partial.lstat().st_mtime > _ABANDONED_AFTER_S:
                    partial.unlink()
            except OSError:
                pass  # its process finished it, another removed it, or it is a directory that somebody made
