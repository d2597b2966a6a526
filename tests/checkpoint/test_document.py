"""Values of a JSON object: what counts as which type, what is out of range, and that the error names file and key."""

from __future__ import annotations

import pytest

from halfbyte.checkpoint.document import LARGEST, Document
from halfbyte.errors import CheckpointError

STRANGE = {
    "string": "4",
    "float": 4.5,
    "list": [4],
    "object": {},
    "true": True,
    "negative": -1,
    "huge": 10**30,
    "NaN": float("nan"),
    "inf": float("inf"),
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
def test_an_integer_is_an_integer(value: object) -> None:
    document = Document({"size": value}, "config.json")
    for read in (lambda: document.value("d_model", "size"), lambda: document.get("size", 1)):
        with pytest.raises(CheckpointError, match=r"config\.json: size does not fit .given .*needed an integer from [01] to 2147483647"):
            read()


@pytest.mark.parametrize("value", [STRANGE[name] for name in ("string", "list", "object", "true", "negative", "huge", "NaN", "inf")])
def test_a_number_is_finite_and_no_bool(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"scale does not fit .*a finite number"):
        Document({"scale": value}, "config.json").get("scale", 1.0)


def test_what_is_right() -> None:
    document = Document({"one": 1, "zero": 0, "half": 0.5, "yes": True, "name": "x", "null": None, "list": [1, 2], "words": ["a"]}, "f")
    assert document.get("one", 7) == 1 and document.get("zero", 7) == 0 and document.get("yes", False) is True and document.get("name", "") == "x"
    number = document.get("one", 2.0)
    assert number == 1.0 and isinstance(number, float) and document.get("half", 2.0) == 0.5
    assert document.get("null", 3) == document.get("absent", 3) == 3 and "null" not in document and "one" in document
    assert document.integers("list") == (1, 2) and document.words("words") == ("a",) and document.words("null") == document.integers("absent") == ()
    assert document.value("null", "one") == 1
    assert Document({"a": LARGEST}, "f").value("a") == LARGEST
    with pytest.raises(CheckpointError, match=r"missing value .needed null or absent"):
        document.value("null", "absent")


def test_ranges() -> None:
    document = Document({"zero": 0, "four": 4}, "f")
    with pytest.raises(CheckpointError, match=r"zero does not fit .given 0; needed an integer from 1 to"):
        document.get("zero", 1, low=1)
    with pytest.raises(CheckpointError, match=r"four does not fit .given 4; needed an integer from 0 to 3"):
        document.get("four", 1, high=3)
    with pytest.raises(CheckpointError, match="zero does not fit"):
        document.value("zero")


@pytest.mark.parametrize("value", ["lm_head", 3, {}, [3], [{}], [None]])
def test_a_list_of_strings(value: object) -> None:
    """A string is not read letter by letter."""
    with pytest.raises(CheckpointError, match="f: ignore does not fit"):
        Document({"ignore": value}, "f").words("ignore")


@pytest.mark.parametrize("value", [[1], "x", 3, True])
def test_objects(value: object) -> None:
    for broken in ({"a": value}, {"a": {"b": value}}):
        document = Document(broken, "f")
        with pytest.raises(CheckpointError, match=r"f: a(\.b)? does not fit .*needed an object"):
            document.sections("a")
    with pytest.raises(CheckpointError, match="f: the document does not fit"):
        Document(value, "f")


def test_errors_name_the_way_to_a_value_and_shorten_it() -> None:
    document = Document({"groups": {"g": {"targets": ["x" * 1000, 3]}}}, "f")
    with pytest.raises(CheckpointError, match=r"f: groups\.g\.targets does not fit .given 3; needed a string"):
        document.sections("groups")["g"].words("targets")
    with pytest.raises(CheckpointError) as caught:
        Document({"a": "\x1b[2J" * 1000}, "f").value("a")
    assert len(str(caught.value)) < 250 and "\x1b" not in str(caught.value)
