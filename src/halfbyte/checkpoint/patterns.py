"""What a pattern of an exclude, ignore or target list means, and `FirstMatch`, which finds the first of many that mean a module.

"re:..." is a regular expression matched from the start. Otherwise the pattern is a glob of the whole name, or of a run of whole path segments, so
that "lm_head", "mlp.gate" and "model.layers.0" mean those modules and everything below them, and never "mlp.gate_proj". `language_model` segments are
ignored on both sides.

No pattern takes long. A list that names every module of a model is a dict, and a regular expression in which Python's matcher could try the same text
again and again is followed by `_ends`, which holds every place that it can have reached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any

from halfbyte.errors import CheckpointError

_parser: Any = re._parser  # type: ignore[attr-defined]  # the parse tree of a regular expression: there is no public way to it
_codes: Any = re._constants  # type: ignore[attr-defined]
_REPEATS = (_codes.MAX_REPEAT, _codes.MIN_REPEAT)
_LETTERS = (_codes.LITERAL, _codes.NOT_LITERAL, _codes.ANY, _codes.IN)
_SPECIAL = re.compile(r"[*?[]")
_MAX_STEPS = 1 << 20  # that Python's matcher may take at worst
_USUAL_LETTERS = 80  # of the name of a module
_FEW = 8  # choices that count as such, and not as a power of the length


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern means `module`.

    >>> matches("model.layers.*.mlp.gate", "model.layers.3.mlp.gate"), matches("mlp.gate", "model.layers.3.mlp.gate_proj")
    (True, False)
    """
    return FirstMatch([pattern]).find(module) is not None


class FirstMatch:
    """The first of many patterns that means a module.

    >>> FirstMatch(["lm_head", "re:.*gate$", "*"]).find("model.layers.0.mlp.gate")
    1
    """

    def __init__(self, patterns: Iterable[str], where: str = "config.json"):
        """Raises CheckpointError for a "re:" pattern that is no regular expression, or one that cannot be matched in a time that is known."""
        self._plain: dict[str, int] = {}
        self._others: list[tuple[int, Callable[[str, str], bool]]] = []
        for index, pattern in enumerate(patterns):
            if pattern.startswith("re:"):
                expression = _Expression.parse(pattern[3:], where)
                self._others.append((index, partial(_matches_expression, expression)))
            elif _SPECIAL.search(pattern):
                self._others.append((index, partial(_matches_glob, _Glob.of(pattern), _Glob.of(_without_language_model(pattern)))))
            else:
                self._plain.setdefault(_without_language_model(pattern), index)

    def find(self, module: str) -> int | None:
        """The index of the first pattern that means `module`; None: there is none."""
        short = _without_language_model(module)
        segments = short.split(".")
        runs = (".".join(segments[i:j]) for i in range(len(segments)) for j in range(i + 1, len(segments) + 1)) if self._plain else ()
        first = min((self._plain[run] for run in runs if run in self._plain), default=None)
        for index, function in self._others:
            if first is not None and index > first:
                break
            if function(module, short):
                return index
        return first


def _without_language_model(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment != "language_model")


@dataclass(frozen=True)
class _Glob:
    """The pattern, its segments, and the longest piece of it that a name must have."""

    pattern: str
    segments: tuple[str, ...]
    literal: str

    @staticmethod
    def of(pattern: str) -> _Glob:
        return _Glob(pattern, tuple(pattern.split(".")), max(_SPECIAL.split(pattern.partition("[")[0]), key=len))

    def matches(self, name: str) -> bool:
        if self.literal not in name:
            return False
        if fnmatchcase(name, self.pattern):
            return True
        segments = name.split(".")
        runs = range(len(segments) - len(self.segments) + 1)
        return any(all(fnmatchcase(segment, glob) for segment, glob in zip(segments[start:], self.segments, strict=False)) for start in runs)


def _matches_glob(written: _Glob, stripped: _Glob, module: str, short: str) -> bool:
    return stripped.matches(short) or (short != module and written.matches(module))


def _matches_expression(expression: _Expression, module: str, short: str) -> bool:
    return expression.matches(module) or (short != module and expression.matches(short))


@dataclass(frozen=True)
class _Expression:
    """A regular expression: its text, the file it stands in, its parse tree, and what `_count_ways` and `_can_follow` say of that."""

    text: str
    where: str
    tree: Any
    ways: tuple[int, int] | None
    can_follow: bool

    @staticmethod
    def parse(text: str, where: str) -> _Expression:
        try:
            tree = _parser.parse(text)
            re.compile(text)
            ways = _count_ways(tree, inside=False)
            can_follow = not tree.state.flags & ~_KNOWN_FLAGS and _can_follow(tree)
        except (re.error, OverflowError, RecursionError) as error:
            raise _unusable(text, where, f"{str(error) or type(error).__name__}") from error
        if not can_follow and (ways is None or _steps(ways, _USUAL_LETTERS) > _MAX_STEPS):
            raise _unusable(text, where, "matching it may take for ever")
        return _Expression(text, where, tree, ways, can_follow)

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.text)

    def matches(self, name: str) -> bool:
        if self.ways is not None and _steps(self.ways, len(name)) <= _MAX_STEPS:
            return self._compiled.match(name) is not None
        if not self.can_follow:
            raise _unusable(self.text, self.where, f"matching it with a name of {len(name)} letters may take for ever")
        return bool(_ends(self.tree, name, {0}, self.tree.state.flags))


def _unusable(text: str, where: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"a pattern cannot be matched: {reason}",
        where=where,
        given=repr(f"re:{text}"[:80]),
        needed="a regular expression without repeats inside of repeats",
        next_step="correct the file, or download it again",
    )


def _steps(ways: tuple[int, int], letters: int) -> int:
    return ways[1] * (letters + 1) ** ways[0]


def _count_ways(tree: Any, *, inside: bool) -> tuple[int, int] | None:
    """(p, f) where Python's matcher tries out at most f * n^p ways through n letters; None where it chooses in a repeat, which no power bounds."""
    power, factor = 0, 1
    for operation, argument in tree:
        ways = 1
        if operation is _codes.BRANCH:
            ways = len(argument[1])
        elif operation in _REPEATS:
            ways = argument[1] - argument[0] + 1
        if inside and ways > 1:
            return None
        power, factor = (power + 1, factor) if ways > _FEW else (power, factor * ways)
        for inner in _inner_trees(operation, argument):
            ways_within = _count_ways(inner, inside=inside or (operation in _REPEATS and argument[1] > 1))
            if ways_within is None:
                return None
            power, factor = power + ways_within[0], factor * ways_within[1]
    return power, factor


def _inner_trees(operation: Any, argument: Any) -> list[Any]:
    if operation is _codes.BRANCH:
        return list(argument[1])
    parts = argument if isinstance(argument, tuple) else (argument,)
    return [part for part in parts if isinstance(part, _parser.SubPattern)]


def _can_follow(tree: Any) -> bool:
    """Whether `_ends` knows everything in a tree: no back references, no looking back, nothing possessive."""
    for operation, argument in tree:
        if not (
            operation in (_codes.BRANCH, *_REPEATS, *_LETTERS)
            or (operation is _codes.SUBPATTERN and not argument[1] and not argument[2])
            or (operation is _codes.AT and argument in _AT)
            or (operation in (_codes.ASSERT, _codes.ASSERT_NOT) and argument[0] > 0)
        ):
            return False
        if not all(map(_can_follow, _inner_trees(operation, argument))):
            return False
    return True


def _ends(tree: Any, text: str, starts: set[int], flags: int) -> set[int]:
    """Where in `text` a match of `tree` can end that begins at one of `starts`; every place once, so in time that grows with the text alone."""
    for operation, argument in tree:
        if operation is _codes.BRANCH:
            starts = set().union(*(_ends(branch, text, starts, flags) for branch in argument[1]))
        elif operation is _codes.SUBPATTERN:
            starts = _ends(argument[3], text, starts, flags)
        elif operation in _REPEATS:
            starts = _repeat(argument, text, starts, flags)
        elif operation is _codes.AT:
            starts = {at for at in starts if _AT[argument](text, at)}
        elif operation in (_codes.ASSERT, _codes.ASSERT_NOT) and argument[0] > 0:
            wanted = operation is _codes.ASSERT
            starts = {at for at in starts if bool(_ends(argument[1], text, {at}, flags)) == wanted}
        else:
            starts = {at + 1 for at in starts if at < len(text) and _accepts(operation, argument, text[at], flags)}
    return starts


def _repeat(argument: Any, text: str, starts: set[int], flags: int) -> set[int]:
    low, high, body = argument
    for _ in range(low):
        following = _ends(body, text, starts, flags)
        if following == starts:
            break
        starts = following
    reached, new, count = set(starts), starts, low
    while new and count < high:
        new = _ends(body, text, new, flags) - reached
        reached |= new
        count += 1
    return reached


_KNOWN_FLAGS = int(re.UNICODE | re.IGNORECASE | re.DOTALL | re.VERBOSE)
_AT: dict[Any, Callable[[str, int], bool]] = {
    _codes.AT_BEGINNING: lambda text, at: at == 0,
    _codes.AT_BEGINNING_STRING: lambda text, at: at == 0,
    _codes.AT_END: lambda text, at: at == len(text) or text[at:] == "\n",
    _codes.AT_END_STRING: lambda text, at: at == len(text),
}
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    _codes.CATEGORY_DIGIT: str.isdecimal,
    _codes.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    _codes.CATEGORY_SPACE: str.isspace,
    _codes.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    _codes.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
    _codes.CATEGORY_NOT_WORD: lambda letter: not (letter.isalnum() or letter == "_"),
}


def _accepts(operation: Any, argument: Any, letter: str, flags: int) -> bool:
    """Whether one element of a regular expression accepts one letter."""
    if operation is _codes.ANY:
        return letter != "\n" or bool(flags & re.DOTALL)
    letters = {letter, letter.lower(), letter.upper()} if flags & re.IGNORECASE else {letter}
    if operation is _codes.IN:
        negated, items = argument[0][0] is _codes.NEGATE, argument
        return any(_is_item(kind, value, each) for kind, value in items for each in letters) != negated
    return any(ord(each) == argument for each in letters if len(each) == 1) == (operation is _codes.LITERAL)


def _is_item(kind: Any, value: Any, letter: str) -> bool:
    """Whether an item of a set of letters is, or holds, a letter."""
    if kind is _codes.CATEGORY:
        return _CATEGORIES[value](letter)
    if len(letter) != 1 or kind is _codes.NEGATE:
        return False
    return value[0] <= ord(letter) <= value[1] if kind is _codes.RANGE else ord(letter) == value
