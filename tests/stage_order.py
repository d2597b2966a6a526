"""Machine code of sm_90 in which warps give stages of shared memory back: has what they read of a stage arrived before they do?

    early_arrivals(output of nvdisasm -c -hex) == []

TMA fills a stage again when every consumer has arrived at its barrier, through a proxy that no barrier orders behind a load on its way; and ptxas
moves instructions as suits the registers. So every path through the code is followed. At an arrival, what was read of the stage must be done in all
warps, which is before the last barrier of the warpgroup:

    LDS, LDSM       an instruction waited for its scoreboard, or FENCE.VIEW.ASYNC for all loads
    HGMMA, QGMMA    WARPGROUP.DEPBAR left only later groups of products in flight

A ring of stages has barriers "full" and "empty", made in turns. What is read behind the n-th wait for "full" is of the n-th stage, and the n-th
arrival at "empty" gives that back. Of two rings, products read the first, and loads the second. Memory that the kernel stores to itself is of no
ring, nor is what lies behind it. A load may come late whose result nobody takes behind the barrier: of a short run at the end of K only some words
are multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

_LINE = re.compile(
    r"^(?P<label>\.L\w+):|/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+ )?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x(?P<control>[0-9a-f]{16}) \*/",
    re.MULTILINE,
)
_OPEN_STAGES = 2  # of a ring: a consumer waits for the next stage before it gives the last one back
_LARGEST_STEP = 256  # by which a loop moves an address
# Which operands of an instruction are added to a number; of a multiplication and an addition, what is not a stage times its size.
_ADDED = {name: slice(1, None) for name in ("UIADD3", "IADD3", "VIADD", "UMOV", "MOV", "R2UR")}
_ADDED |= {"ULEA": slice(2, 3), "LEA": slice(2, 3), "UIMAD": slice(3, 4), "IMAD": slice(3, 4)}


class Early(NamedTuple):
    """An arrival, and a read that may not be done then: addresses of instructions."""

    arrival: int
    read: int


class _Instruction(NamedTuple):
    address: int
    is_guarded: bool
    name: str
    operands: tuple[str, ...]
    control: int  # the upper half of the encoding

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def waits(self) -> int:
        """The scoreboards that must be clear before it is issued, a bit each."""
        return self.control >> 52 & 63

    @property
    def scoreboard(self) -> int:
        """That of its result, as such a bit; 0 if it has none."""
        return 1 << (self.control >> 46 & 7) & 63

    @property
    def memory(self) -> list[str]:
        """The terms of its address in shared memory: registers and numbers."""
        return next((operand.strip("[]").split("+") for operand in self.operands if operand.startswith("[")), [])

    @property
    def ends_block(self) -> bool:
        return self.kind in ("BRA", "BRX", "EXIT")

    def registers(self, operand: int) -> frozenset[int]:
        """Those of an operand, of a wide one up to four."""
        count = 4 if re.search(r"MMA|128|M88\.4", self.name) else 2 if re.search(r"\.64|WIDE|CS2R", self.name) else 1
        return frozenset(int(first) + more for first in re.findall(r"\bR(\d+)", self.operands[operand]) for more in range(count))


class _Read(NamedTuple):
    """Of a stage. `waits`: of a load its scoreboard, 0 for that of the next load, as they arrive in order; of a product how many groups of products
    were complete since. `is_done`: in this warp, and in the others behind the next barrier."""

    address: int
    is_product: bool
    waits: int
    is_done: bool = False


_Rings: TypeAlias = tuple[tuple[frozenset[_Read], ...], ...]  # of each, the stages that were waited for and not given back, the oldest first


def early_arrivals(sass: str) -> list[Early]:
    """Those of all paths. What reads or gives back a stage without having waited for one, or has waited for more than two, is none: its branches
    exclude one another. Others must lead to all barriers."""
    code = _Code(sass)
    found: set[Early] = set()
    reached: set[int] = set()
    start: _Rings = ((),) * (1 + max(ring for ring, _ in code.barriers.values()))
    seen: set[tuple[int, _Rings]] = set()
    todo = [(0, start)]
    while todo:
        number, rings = place = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        for instruction in code.blocks[number]:
            rings = _behind(instruction, rings, code, found)
            if not rings:
                break
            reached.add(instruction.address)
        else:
            is_partition = instruction.kind == "BRX"  # others follow, which have read nothing yet
            todo += [(following, start if is_partition else rings) for following in code.following[number]]
    assert reached >= code.barriers.keys(), "no path leads to some barriers"
    return sorted(found)


class _Code:
    """Instructions, in blocks without branches between them.

    Attributes:
        following: which blocks may follow each.
        barriers: of waits for stages and of arrivals, by address: the number of the ring, and whether it is an arrival.
        stored: the first address that the kernel stores to.
    """

    def __init__(self, sass: str) -> None:
        self.blocks: list[list[_Instruction]] = [[]]
        labels: dict[str, int] = {}
        for match in _LINE.finditer(sass):
            if self.blocks[-1] and (match["label"] or self.blocks[-1][-1].ends_block):
                self.blocks.append([])
            if match["label"]:
                labels[match["label"]] = len(self.blocks) - 1
            else:
                operands = tuple(match["operands"].replace(".reuse", "").split(", "))
                self.blocks[-1].append(
                    _Instruction(int(match["address"], 16), match["guard"] is not None, match["name"], operands, int(match["control"], 16))
                )
        self.blocks = [block for block in self.blocks if block]
        self.following = [self._following(number, labels) for number in range(len(self.blocks))]
        code = [instruction for block in self.blocks for instruction in block]
        self._places = {i.address: (number, at) for number, block in enumerate(self.blocks) for at, i in enumerate(block)}
        self._taken: dict[tuple[int, int], bool] = {}
        self.stored = min(_number(instruction.memory) for instruction in code if instruction.kind in ("STS", "STSM"))
        # A wait that did not end at once goes on in a block of its own, again and again.
        again = {instruction.address for number, block in enumerate(self.blocks) if number in self.following[number] for instruction in block}
        self.barriers = {address: barrier for address, barrier in _barriers(code) if address not in again}

    def _following(self, number: int, labels: dict[str, int]) -> list[int]:
        last = self.blocks[number][-1]
        targets = [labels[target] for target in re.findall(r"\.L\w+", " ".join(last.operands))] if last.ends_block else []
        return targets if last.ends_block and not last.is_guarded else [*targets, number + 1]

    def outlasts(self, read: _Read, barrier: _Instruction) -> bool:
        """Whether the read may be under way behind a barrier, and somebody takes its result there."""
        if read.is_done or read.is_product:
            return not read.is_done
        key = read.address, barrier.address
        if key not in self._taken:
            number, at = self._places[read.address]
            self._taken[key] = self._is_taken(self.blocks[number][at].registers(0), *self._places[barrier.address])
        return self._taken[key]

    def _is_taken(self, registers: frozenset[int], number: int, at: int) -> bool:
        """Whether one of the registers is an operand behind instruction `at` of a block before it is written."""
        seen: set[tuple[int, frozenset[int]]] = set()
        todo = [(number, at + 1, registers)]
        while todo:
            number, at, registers = todo.pop()
            for i in self.blocks[number][at:]:
                if any(registers & i.registers(operand) for operand in range(0 if i.kind.startswith("ST") else 1, len(i.operands))):
                    return True
                registers -= frozenset() if i.is_guarded else i.registers(0)
            ahead = {(following, registers) for following in self.following[number] if registers} - seen
            seen |= ahead
            todo += [(following, 0, registers) for following, registers in ahead]
        return False


def _barriers(code: list[_Instruction]) -> Iterator[tuple[int, tuple[int, bool]]]:
    """The producers' waits are left out."""
    made = [_number(instruction.memory) for instruction in code if instruction.name.startswith("SYNCS.EXCH")]
    meaning: dict[int, tuple[int, bool]] = {}
    ring = -1
    for full, empty in zip(made[::2], made[1::2], strict=True):
        ring += meaning.get(full - 8) != (ring, False)  # unless it is of the next stage
        meaning |= {full: (ring, False), empty: (ring, True)}
    for at, instruction in enumerate(code):
        is_arrival = ".A1T0" in instruction.name
        if is_arrival or "TRYWAIT" in instruction.name:
            place = _number(instruction.memory)
            found = meaning.get(place) or meaning.get(place + _number_in(instruction.memory, code, at))
            assert found or not is_arrival, f"at which barrier is {instruction}"
            if found and found[1] == is_arrival:
                yield instruction.address, found


def _number(terms: Sequence[str]) -> int:
    return sum(int(term, 0) for term in terms if re.fullmatch(r"-?0x[0-9a-f]+", term))


def _number_in(terms: Sequence[str], code: list[_Instruction], end: int, depth: int = 6) -> int:
    """What was added to the registers among `terms` before instruction `end`, but for what a loop adds to them again and again."""
    total = 0
    for register in terms if depth else ():
        for at in range(end - 1, -1, -1):
            i = code[at]
            sources = i.operands[_ADDED.get(i.kind, slice(0))]
            if i.operands[0] == register and not (register in sources and 0 < abs(_number(sources)) < _LARGEST_STEP):
                if "0x18" not in i.operands:  # by which the number of a block is shifted, to where its shared memory begins
                    total += _number(sources) + _number_in(sources, code, at, depth - 1)
                break
    return total


def _behind(i: _Instruction, rings: _Rings, code: _Code, found: set[Early]) -> _Rings:
    """What has been read and not been given back behind an instruction; nothing at all if no thread comes here."""
    if i.waits:
        rings = _each(rings, lambda read: read._replace(is_done=True) if not read.is_product and read.waits & i.waits else read)
    if i.address in code.barriers:
        number, is_arrival = code.barriers[i.address]
        stages = rings[number]
        if is_arrival:
            found |= {Early(i.address, read.address) for stage in stages[:1] for read in stage}
            return _with(rings, number, stages[1:]) if stages else ()
        return _with(rings, number, (*stages, frozenset())) if len(stages) < _OPEN_STAGES else ()
    if i.kind in ("LDS", "LDSM") and _number(i.memory) < code.stored:
        rings = _each(rings, lambda read: read if read.is_product or read.waits else read._replace(waits=i.scoreboard))
        return _add(rings, len(rings) - 1, _Read(i.address, False, i.scoreboard))
    if i.kind in ("HGMMA", "QGMMA"):
        rings = _add(rings, 0, _Read(i.address, True, 0))
        return _each(rings, lambda read: read._replace(waits=read.waits + 1) if read.is_product else read) if "gsb0" in i.operands else rings
    if i.name == "WARPGROUP.DEPBAR.LE":
        return _each(rings, lambda read: read._replace(is_done=True) if read.is_product and read.waits > int(i.operands[1], 0) else read)
    if i.name.startswith("FENCE.VIEW.ASYNC"):
        return _each(rings, lambda read: read if read.is_product else read._replace(is_done=True))
    if i.kind == "BAR":
        return tuple(tuple(frozenset(read for read in stage if code.outlasts(read, i)) for stage in stages) for stages in rings)
    return rings


def _each(rings: _Rings, change: Callable[[_Read], _Read]) -> _Rings:
    return tuple(tuple(frozenset(map(change, stage)) for stage in stages) for stages in rings)


def _with(rings: _Rings, number: int, stages: tuple[frozenset[_Read], ...]) -> _Rings:
    return (*rings[:number], stages, *rings[number + 1 :])


def _add(rings: _Rings, number: int, read: _Read) -> _Rings:
    """To the stage of a ring that was waited for last."""
    stages = rings[number]
    return _with(rings, number, (*stages[:-1], stages[-1] | {read})) if stages else ()
