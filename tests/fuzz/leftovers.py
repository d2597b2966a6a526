"""What an earlier run left, damaged: experts that `prepare` cached, the unfinished result of `quantize`. A later run says so, or does it again.

It ends as if nothing had been left, or in one line that says what is wrong; a step which that line names helps.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fuzz.damaged_documents import ODD_VALUES, SIZES, paths
from fuzz.damaged_files import ODD_FILES, TEXTS
from fuzz.judge import WrongError, command, guarded
from fuzz.sound import TEXT, Files, join, sound, split, write

from halfbyte.checkpoint.writer import JOURNAL, PARTIAL
from halfbyte.convert import QuantizeOptions, quantize_model
from halfbyte.errors import HalfbyteError
from halfbyte.loading import iter_prepared

SHARD_BYTES = 100_000
BYSTANDER = b"a file of somebody else"
_PAGE = 4096
_KEPT = tempfile.TemporaryDirectory()  # until this process ends: what was left belongs to the model at its path


@dataclass(frozen=True)
class Earlier:
    """A model, and what runs on it leave.

    Attributes:
        arguments: of the command that goes on with what was left; the model comes first, the directory is missing.
        left: the files that it finds.
        whole: the files of a run that finds nothing.
        experts: what `load_prepared` returns, by layer and tensor; empty where it is not about a cache.
    """

    model: Path
    arguments: tuple[str, ...]
    left: Files
    whole: Files
    experts: dict[str, torch.Tensor]


def files_of(path: Path) -> Files:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@cache
def _model(layout: str) -> Path:
    return write(sound(layout), Path(_KEPT.name, layout))


@cache
def cached(layout: str, arrangement: str) -> Earlier:
    """Prepared experts of a sound model."""
    model, folder = _model(layout), Path(_KEPT.name, f"{layout} {arrangement}")
    arguments = ("prepare", str(model), "--device", "cpu", "--layout", arrangement, "--json", "--cache-dir")
    if command(*arguments, str(folder))[0]:
        raise AssertionError(f"{layout} cannot be prepared as {arrangement}")
    whole = files_of(folder)
    return Earlier(model, arguments, whole, whole, _experts(model, arrangement, folder, "off"))


def _experts(model: Path, arrangement: str, folder: Path, use: Any) -> dict[str, torch.Tensor]:
    loaded = iter_prepared(model, device="cpu", layout=arrangement, cache=use, cache_dir=folder)
    return {f"{layer} {name}": tensor for layer, experts in loaded for name, tensor in experts.storage.tensors.items()}


@cache
def unfinished(layout: str, calibrated: bool) -> Earlier:
    """The result of a `quantize` that was interrupted half-way, with what it keeps in its journal."""
    model, folder = _model(layout), Path(_KEPT.name, f"{layout} {calibrated}")
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text(TEXT)
    arguments = ("quantize", str(model), "--max-shard-size", str(SHARD_BYTES), *(("--calibrate", str(text)) if calibrated else ()))
    if command(*arguments, str(folder / "whole"))[0]:
        raise AssertionError(f"{layout} cannot be quantised")

    def stop(done: int, total: int) -> None:
        if done > total * 3 // 4:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        quantize_model(model, folder / "half", QuantizeOptions(max_shard_bytes=SHARD_BYTES, calibrate=text if calibrated else None), progress=stop)
    return Earlier(model, arguments, files_of(folder / "half"), files_of(folder / "whole"), {})


# Each takes what was left, and the name of one of its files, and says what it did.
Maker = Callable[[random.Random, Files, str], str]
MAKERS: list[Maker] = []


def maker(function: Maker) -> Maker:
    MAKERS.append(function)
    return function


@maker
def cut(rng: random.Random, files: Files, name: str) -> str:
    size = len(files[name])
    length = min(rng.choice((0, 1, 7, 8, 9, size // 2, size - 1, rng.randrange(size))), size - 1)
    files[name] = files[name][:length]
    return f"cut to {length} of {size} bytes"


@maker
def longer(rng: random.Random, files: Files, name: str) -> str:
    more = rng.choice((b"\0", b"\0" * 8, b"x" * _PAGE, b"\n{}"))
    files[name] += more
    return f"{len(more)} bytes more"


@maker
def flipped(rng: random.Random, files: Files, name: str) -> str:
    content, bits = bytearray(files[name]), rng.choice((1, 1, 2, 40))
    for position in (rng.randrange(min(len(content), rng.choice((8, 600, 1 << 40)))) for _ in range(bits)):
        content[position] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)
    return f"{bits} bits flipped"


@maker
def lost_pages(rng: random.Random, files: Files, name: str) -> str:
    """Pages of zeros, or in each other's place, as disks leave them."""
    content, kind = files[name], rng.choice(("zeros", "the next one", "none"))
    first = rng.randrange(len(content)) // _PAGE * _PAGE
    page, rest = content[first : first + _PAGE], content[first + _PAGE :]
    other = {"zeros": bytes(len(page)) + rest, "the next one": rest[:_PAGE] + page + rest[_PAGE:], "none": rest}[kind]
    files[name] = content[:first] + other
    return f"in place of page {first // _PAGE}: {kind}"


@maker
def odd_file(rng: random.Random, files: Files, name: str) -> str:
    """Another kind of file, or one that is somewhere else."""
    content, kind = files[name], rng.choice(("a link to itself elsewhere", "a link to a bystander", "a full directory", "absent", *ODD_FILES))

    def moved(path: Path) -> None:
        elsewhere = _outside(path) / "elsewhere"
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)

    def full(path: Path) -> None:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "file").write_bytes(content)

    further: dict[str, Any] = {
        "a link to itself elsewhere": moved,
        "a link to a bystander": lambda path: path.symlink_to(_outside(path) / "bystander"),
        "a full directory": full,
    }
    files[name] = (further | ODD_FILES).get(kind)
    if kind == "absent":
        del files[name]
    return f"is {kind}"


@maker
def odd_directory(rng: random.Random, files: Files, name: str) -> str:
    """Something else where one of its directories should be."""
    parents = [str(parent) for parent in Path(name).parents if str(parent) != "."]
    if not parents:
        return odd_file(rng, files, name)
    parent, kind = rng.choice(parents), rng.choice([kind for kind in ODD_FILES if kind != "a directory"])
    for other in [other for other in files if other.startswith(f"{parent}/")]:
        del files[other]
    files[parent] = ODD_FILES[kind]
    return f"directory {parent} is {kind}"


@maker
def stray(rng: random.Random, files: Files, name: str) -> str:
    """Something beside it, under a name that a writer gives."""
    kind, other = rng.choice(list(ODD_FILES)), rng.choice((f"{name}.0123abcd{PARTIAL}", f"{Path(name).parent}/.tmp0123"))
    files[other] = ODD_FILES[kind]
    return f"beside it {other}: {kind}"


@maker
def of_another(rng: random.Random, files: Files, name: str) -> str:
    """The content of another file."""
    other = rng.choice(list(files))
    files[name], files[other] = files[other], files[name]
    return f"in the place of {other}"


@maker
def odd_text(rng: random.Random, files: Files, name: str) -> str:
    kind = rng.choice(list(TEXTS))
    _edit(files, name, lambda document: TEXTS[kind](json.dumps(document).encode()))
    return f"{kind} in its JSON"


@maker
def odd_value(rng: random.Random, files: Files, name: str) -> str:
    """Another value in a journal, or in a header: another type, another version, another checksum."""
    said: list[str] = []

    def change(document: Any) -> bytes:
        path = rng.choice(paths(document))
        place = document
        for key in path[:-1]:
            place = place[key]
        before = place[path[-1]]
        if rng.random() < 0.15:
            del place[path[-1]]
        else:
            near = (f"{before}0", [before], {"a": before}, before[:-1] if isinstance(before, str) else 7)
            place[path[-1]] = rng.choice((*SIZES, *ODD_VALUES, None, "0.1.0", *near))
        said.append(f"{'.'.join(map(str, path))}, before {before!r}"[:200])
        return json.dumps(document).encode()

    _edit(files, name, change)
    return f"odd value of {said[0]}"


def _edit(files: Files, name: str, change: Callable[[Any], bytes]) -> None:
    """Change the JSON of a file that has nothing else, or the header of a safetensors file."""
    if name.endswith(".safetensors"):
        header, data = split(files[name])
        files[name] = join(change(header), data)
    else:
        files[name] = change(json.loads(files[name]))


def _outside(path: Path) -> Path:
    """The folder beside what was left, with a file that no run may touch."""
    return next(parent for parent in path.parents if (parent / "bystander").exists())


def run_case(layout: str, rng: random.Random) -> tuple[str, str]:
    """Damage what was left of one layout, and judge: the verdict, "told" or "harmless", and what was done.

    Raises:
        WrongError: the later run was not as it should be.
    """
    can_quantize = layout in ("dense", "fp8-block")
    of_job = can_quantize and rng.random() < 0.75
    arrangement = "canonical" if can_quantize else rng.choice(("canonical", "hopper"))
    earlier = unfinished(layout, rng.random() < 0.2) if of_job else cached(layout, arrangement)
    files, said = dict(earlier.left), earlier.arguments[0]
    for _ in range(rng.choice((1, 1, 2))):
        names = [name for name in files if files[name] is earlier.left.get(name) and name.endswith(("safetensors", JOURNAL))]
        if names:
            name, chosen = rng.choice([*names, *[JOURNAL] * 6 * (JOURNAL in names)]), rng.choice(MAKERS)
            said += f"; {chosen.__name__}: {name} {chosen(rng, files, name)}"
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "bystander").write_bytes(BYSTANDER)
        path = write(files, Path(directory) / "left")
        try:
            verdict = (judge_job if of_job else judge_cache)(earlier, path, rng)
        except WrongError as error:
            return f"wrong: {error}", said
        if (Path(directory) / "bystander").read_bytes() != BYSTANDER:
            return "wrong: another file was written to", said
        return verdict, said


def judge_cache(earlier: Earlier, path: Path, rng: random.Random) -> str:
    """Loading gives the same experts whatever is there; `prepare` ends with the same files, or says why it cannot write."""
    arrangement = earlier.arguments[5]

    def load() -> None:
        experts = guarded("load_prepared", lambda: _experts(earlier.model, arrangement, path, "read"))
        if not all(torch.equal(experts[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in earlier.experts.items()):
            raise WrongError("load_prepared returns other experts")

    try:
        load()
        code, printed = command(*earlier.arguments, str(path), *rng.choice(((), ("--verify",))))
        load()
    except HalfbyteError as error:
        raise WrongError(f"load_prepared refuses: {error}") from error
    if code:
        return "told"
    written = [str(Path(layer["file"]).relative_to(path)) for layer in json.loads(printed)["layers"] if layer["written"]]
    if any((path / name).read_bytes() != earlier.whole[name] for name in written):
        raise WrongError("prepare writes other bytes")
    return "told" if written else "harmless"


def judge_job(earlier: Earlier, path: Path, rng: random.Random) -> str:
    """`quantize` goes on to the same bytes, or one line says what is wrong; where it names --restart, that helps."""
    code, line = command(*earlier.arguments, str(path))
    if code and "--restart" in line:
        again, said = command(*earlier.arguments, str(path), "--restart")
        if again:
            raise WrongError(f"--restart does not help: {said}")
    elif code:
        return "told"
    if files_of(path) != earlier.whole:
        differing = {*files_of(path).items()} ^ {*earlier.whole.items()}
        raise WrongError(f"quantize leaves other files: {sorted({name for name, _ in differing})}")
    if any(file.is_symlink() for file in path.rglob("*")):
        raise WrongError("quantize leaves links")
    return "told" if code else "harmless"
