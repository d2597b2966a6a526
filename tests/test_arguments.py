"""Devices by name, tensors by type, equality by bits."""

from __future__ import annotations

import pytest
import torch

from halfbyte.arguments import as_device, check_tensors, dense_rows, same_bits
from halfbyte.errors import InputError, UnsupportedError


@pytest.mark.parametrize("name", ["banana", "cuda:99", "", 10**30])
def test_a_device_that_is_not_there(name: object) -> None:
    with pytest.raises(UnsupportedError, match=r"here: cannot use the device: .*Run: halfbyte doctor"):
        as_device(name, "here")


@pytest.mark.parametrize("name", [None, 3.5, int, torch.ones(1)])
def test_what_is_no_device(name: object) -> None:
    with pytest.raises(InputError, match="here: device is no device"):
        as_device(name, "here")


def test_a_device_that_is_there() -> None:
    assert as_device("cpu", "here") == as_device(torch.device("cpu"), "here") == torch.device("cpu")


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(InputError, match=r"f: y is no tensor \(given list; needed torch.Tensor\)"):
        check_tensors("f", x=torch.ones(1), y=[1])


def test_rows_that_kernels_can_read_in_words() -> None:
    x = torch.arange(6 * 9, dtype=torch.int16).view(6, 9).bfloat16()
    for view in (x, x[1:2], x[:1, :4], x[:1, 1:5], x[::2], x[:, ::2], x.T, x.flatten()[3:51].view(6, 8), x[:0]):
        rows = dense_rows(view)
        assert torch.equal(rows, view) and rows.stride() == (view.shape[1], 1) and rows.data_ptr() % 16 == 0
    assert dense_rows(x) is x


def test_bits_decide() -> None:
    ones, nan = torch.ones(2, 2), torch.tensor(torch.nan)
    column = torch.ones(1, 3).t()  # contiguous, though its last stride is not 1
    assert same_bits({"a": column}, {"a": torch.ones(3, 1)})
    e4m3 = ones.to(torch.float8_e4m3fn)
    assert same_bits({"a": ones, "b": nan, "c": e4m3}, {"a": ones.clone(), "b": nan.clone(), "c": e4m3.clone()})
    for other in (ones + 1e-7, ones.flatten(), ones.double(), ones.to("meta")):
        assert not same_bits({"a": ones}, {"a": other})
    assert not same_bits({"a": torch.zeros(1)}, {"a": -torch.zeros(1)}) and not same_bits({"a": ones}, {"b": ones})
