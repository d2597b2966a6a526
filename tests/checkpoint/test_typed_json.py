"""JSON read back into dataclasses: every value has the type that it was written with, or the error says where it has not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import pytest

from halfbyte.checkpoint.typed_json import typed


@dataclass(frozen=True)
class Part:
    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    kind: Literal["a", "b"]
    part: Part
    times: dict[str, list[float]]
    limit: float | None = None
    done: bool = False
    columns: ClassVar[tuple[str, ...]] = ("kind",)


WHOLE = Whole("b", Part("x", (1, 2)), {"t": [0.5, 2]})


def test_what_was_written_is_read() -> None:
    assert typed(Whole, json.loads(json.dumps(asdict(WHOLE))), "whole") == WHOLE
    assert typed(Whole, {"kind": "b", "part": {"name": "x", "sizes": [1, 2]}, "times": {"t": [0.5, 2]}}, "whole") == WHOLE  # defaults may be absent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "c"}, "whole.kind is 'c'"),
        ({"kind": ["a"]}, r"whole.kind is \['a'\]"),
        ({"part": None}, "whole.part is None, no Part"),
        ({"part": {"name": "x"}}, "whole.part lacks 'sizes'"),
        ({"part": {"name": 3, "sizes": []}}, "whole.part.name is 3, no str"),
        ({"part": {"name": "x", "sizes": [1, True]}}, r"whole.part.sizes\[1\] is True, no int"),
        ({"part": {"name": "x", "sizes": [10**400]}}, r"whole.part.sizes\[0\] is 1000.*000, no int"),
        ({"times": {"t": [float("nan")]}}, r"whole.times.t\[0\] is nan, no float"),
        ({"limit": "4"}, "whole.limit is '4', no float"),
        ({"limit": float("inf")}, "whole.limit is inf"),
        ({"done": 1}, "whole.done is 1, no bool"),
        ({"columns": ["kind"]}, "whole has 'columns', which is no part of it"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        typed(Whole, json.loads(json.dumps(asdict(WHOLE))) | change, "whole")
