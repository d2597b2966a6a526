"""Races in another process: one that hangs, one that dies, one that is wrong; each is named and stays out."""

from __future__ import annotations

from contextlib import closing
from functools import partial

import pytest
from tracks import Track

from halfbyte.tuning.marshal import Marshal


@pytest.mark.slow
def test_what_hangs_dies_or_is_wrong_is_excluded_and_named() -> None:
    with closing(Marshal(patience_s=20.0).open(Track)) as measure:
        first = measure.ceilings()["process"]
        times = measure(8, "uniform", ["good", "dies", "wrong", "fine"])
        assert times["good"].us == times["fine"].us == 8.0
        assert times["dies"].reason == "ended the process with exit code 11" and times["wrong"].reason == "the result is wrong"
        second = measure.ceilings()["process"]
        assert second != first
        assert measure(4, "skewed", ["dies", "good", "wrong"])["dies"].reason  # not tried again: the process is the same
        assert measure.ceilings()["process"] == second
        measure._patience_s = 1.0
        assert measure(8, "uniform", ["good", "hangs"])["hangs"].reason == "hung: nothing was heard for 1 s"


def test_layers_share_a_process_and_no_failures() -> None:
    with closing(Marshal(patience_s=20.0).open(Track)) as measure:
        process = measure.ceilings()["process"]
        assert measure(8, "uniform", ["good", "wrong"])["wrong"].reason
        measure.open(partial(Track, wrong=()))
        assert measure(8, "uniform", ["good", "wrong"])["wrong"].us == 8.0 and measure.ceilings()["process"] == process
        assert measure(8, "uniform", ["dies"])["dies"].reason  # the process that follows has the layer that is open
        assert measure(8, "uniform", ["wrong"])["wrong"].us == 8.0 and measure.ceilings()["process"] != process


def test_a_layer_that_cannot_be_made_ends_no_tune() -> None:
    with closing(Marshal(patience_s=20.0).open(partial(int, "no layer"))) as measure:
        assert measure.ceilings() == {}
        assert measure(8, "uniform", ["good"])["good"].reason == "ended the process with exit code 1"
        assert measure.open(Track)(8, "uniform", ["good"])["good"].us == 8.0
