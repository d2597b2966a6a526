"""How many calls, how many samples, and what the time is of."""

import time

import pytest
import torch

from halfbyte.bench.timing import calls_of, time_calls, weight_sets_of


def test_short_calls_are_many():
    assert [calls_of(tokens) for tokens in (1, 64, 65, 256, 257, 8192)] == [8, 8, 4, 4, 1, 1]


def test_weights_rotate_until_four_times_l2():
    assert weight_sets_of(touched_bytes=100, l2_bytes=50) == 2
    assert weight_sets_of(touched_bytes=101, l2_bytes=50) == 2
    assert weight_sets_of(touched_bytes=99, l2_bytes=50) == 3
    assert weight_sets_of(touched_bytes=1, l2_bytes=50) == 16
    assert weight_sets_of(touched_bytes=1, l2_bytes=0) == 1


def test_time_is_of_one_call_on_average():
    timing = time_calls([lambda: time.sleep(0.001), lambda: time.sleep(0.003)], torch.device("cpu"), sample_ms=1)
    assert 2000 <= timing.median_us < 20000 and timing.samples == 8 and timing.timer == "wall clock" and timing.spread >= 0


def test_samples_are_at_most_forty():
    assert time_calls([lambda: None], torch.device("cpu")).samples == 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_takes_the_time_of_its_kernels():
    device = torch.device("cuda")
    small, large = (torch.empty(size, dtype=torch.uint8, device=device) for size in (1 << 28, 1 << 30))
    short = time_calls([lambda: small.add_(1)] * 4, device)
    long = time_calls([lambda: large.add_(1)] * 4, device)
    assert short.timer == "cuda graph" and 3 < long.median_us / short.median_us < 5
