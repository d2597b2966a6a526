"""Lists of patterns: what they mean is in test_quantization.py; here how fast they are looked up, and that no regular expression takes for ever."""

from __future__ import annotations

import random
import re
import time

import pytest

from halfbyte.checkpoint.patterns import FirstMatch, matches
from halfbyte.errors import CheckpointError

MODULE = "model.layers.60.mlp.experts.0.gate_proj"


def test_the_first_pattern_counts_whatever_its_kind() -> None:
    patterns = ["model.layers.60.mlp.experts.1", "re:.*up_proj$", "model.layers.60.*", "experts.0", "mlp", "*"]
    found = {name: FirstMatch(patterns).find(name) for name in (MODULE, MODULE.replace("gate", "up"), "a.mlp.b", "experts.0.x", "lm_head")}
    assert list(found.values()) == [2, 1, 4, 3, 5]
    assert FirstMatch(["experts.0", "model.*"]).find(MODULE) == 0 and FirstMatch(["a", "b.c"]).find(MODULE) is None
    assert FirstMatch(["twice", "twice"]).find("language_model.twice") == 0


def test_a_pattern_means_what_it_says_also_with_the_segment_that_exporters_leave_out() -> None:
    for pattern in ("*.layers.9.mlp*", "language_model.layers.9*", "*.layers.9", "language_model*", "*e_model.layers.9.*"):
        assert matches(pattern, "language_model.layers.9.mlp.gate"), pattern
    assert not matches("*.layers.9.mlp*", "layers.9.mlp.gate") and not matches("x.layers.9.mlp*", "language_model.layers.9.mlp")


def test_a_model_of_names_is_looked_up_at_once() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{e}.{p}_proj" for layer in range(3, 61) for e in range(256) for p in ("gate", "up", "down")]
    start = time.process_time()
    found = FirstMatch(names)
    assert [found.find(name) for name in names[::97]] == list(range(0, len(names), 97))
    assert time.process_time() - start < 2  # one pass over the list for each of them took minutes


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (r"(.+)+#", "a" * 60, False),
        (r"(.+)+#", "a" * 60 + "#", True),
        (r"(\w+\.?)+!", MODULE, False),
        (r"(a|a)+$", "a" * 60 + "b", False),
        (r"(a|ab)(c|bcd)(d*)", "abcd", True),
        (r"(?:a?){40}a{40}", "a" * 40, True),
        ("a?" * 40 + "a" * 40, "a" * 39, False),
        (".*" * 12 + "x", "a" * 80, False),
        (r"((a{0,20}){0,20}){0,20}b", "a" * 60, False),
        (r"(?:[a-z_]+\.)*lm_head", "language_model.model.lm_head", True),
        (r"(?:[a-z_]+\.)*lm_head$", "language_model.model.lm_head.x", False),
        (r"(?:(?!experts).)*gate", "model.layers.0.mlp.gate", True),
        (r"(?:(?!experts).)*gate_proj", MODULE, False),
        (r"(?i:(?:MODEL)*)", "model", True),
        (r".*", "a." * 20_000, True),
        (r".*.*!", "a." * 1000, False),
    ],
)
def test_no_regular_expression_takes_long(pattern: str, name: str, expected: bool) -> None:
    start = time.process_time()
    assert matches(f"re:{pattern}", name) is expected
    assert time.process_time() - start < 2


@pytest.mark.parametrize("pattern", ["(", "*[", r"(a+)+\1", "(?<=a)(b*)*c", "(" * 5000 + ")" * 5000, "a{99999999999}"])
def test_what_cannot_be_matched_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match=r"quant\.json: a pattern cannot be matched: .* .given .re:"):
        FirstMatch([f"re:{pattern}"], "quant.json")


def test_expressions_with_repeats_in_repeats_mean_what_python_says() -> None:
    """Those that the set of reachable places decides, against Python's own matcher, on names so short that it is through at once."""
    atoms = ["a", "b", ".", "[ab]", "[^a]", r"\w", r"\d", "(a|b)", "(?:ab|a)", "^", "$", "(?=a)", "(?!b)", r"[\d_-]"]
    generator, compared = random.Random(0), 0
    for _ in range(3000):
        inner = "".join(generator.choice(atoms) + generator.choice(["", "*", "+", "?", "{1,2}", "*?"]) for _ in range(generator.randint(1, 4)))
        pattern = f"({inner})" + generator.choice(["*", "+", "{2}", "{0,3}", "{2,}"]) + generator.choice(["", "a", "$", ".b"])
        name = "".join(generator.choice("ab1_") for _ in range(generator.randint(0, 6)))
        try:
            expected = re.match(pattern, name) is not None
        except re.error:
            continue
        assert matches(f"re:{pattern}", name) is expected, (pattern, name)
        compared += 1
    assert compared > 2000
