"""Settings of the whole test run, docstring examples included."""

import atexit
import gc
import os

import pytest
import torch

import halfbyte

# They import engines, which are not installed here; tests/integrations put stubs in their place.
collect_ignore = [f"src/halfbyte/integrations/{engine}/{module}.py" for engine in ("vllm", "sglang") for module in ("hook", "peers", "takeover")]


def pytest_configure() -> None:
    gc.disable()  # nothing that is imported and collected is garbage, and to look for some takes a tenth of the time
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # nobody debugs these kernels, and it takes a fifth of the time of compiling
    if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core already: torch's own threads would only get in each other's way
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.freeze()  # nor is it later
    gc.enable()


def pytest_unconfigure() -> None:
    atexit.register(gc.unfreeze)  # or nanobind reports what is never freed; later than pytest, which collects garbage five times


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what the user keeps."""
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "no cache"))


@pytest.fixture(autouse=True)
def example_names(doctest_namespace: dict[str, object]) -> None:
    """Names that every docstring example may use without importing them."""
    doctest_namespace.update(torch=torch, halfbyte=halfbyte)
