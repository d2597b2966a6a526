"""Names that every docstring example may use without importing them."""

import pytest
import torch

import halfbyte


@pytest.fixture(autouse=True)
def example_names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, halfbyte=halfbyte)
