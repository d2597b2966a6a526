"""`Workspace`: what calls take of it, that it is what `workspace_nbytes` says, and that results do not change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import on_hopper
from random_experts import make_experts

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.formats.activation_formats import ACTIVATION_FORMATS
from halfbyte.kernels.workspace import kept_in_workspace, lend, scratch

HOPPER = hb.Target("NVIDIA H100", "sm_90", 132, 50 << 20, 3350.0)
EXPERTS, TOP_K = 8, 2


def buffer(nbytes: int, device: str = "cpu") -> hb.Workspace:
    return hb.Workspace(torch.empty(nbytes, dtype=torch.uint8, device=device))


def test_calls_start_anew_and_what_does_not_fit_is_allocated() -> None:
    workspace = buffer(4096)
    with lend(workspace):
        first, second = scratch((3,), torch.int32, torch.device("cpu")), scratch((2, 5), torch.bfloat16, torch.device("cpu"))
        other = scratch((4096,), torch.uint8, torch.device("cpu"))
    inside = range(workspace.buffer.data_ptr(), workspace.buffer.data_ptr() + workspace.nbytes)
    assert (first.data_ptr() - inside.start, second.data_ptr() - inside.start) == (0, 256) and inside.start % 256 == 0
    assert (second.dtype, second.shape) == (torch.bfloat16, (2, 5)) and other.data_ptr() not in inside
    with lend(workspace):
        assert scratch((7,), torch.uint8, torch.device("cpu")).data_ptr() == inside.start
    assert scratch((7,), torch.uint8, torch.device("cpu")).data_ptr() not in inside  # the loan is over


def test_the_same_objects_serve_calls_that_ask_for_the_same_and_what_did_not_fit_is_made_anew() -> None:
    @kept_in_workspace
    def pair(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return scratch((size,), torch.uint8, torch.device("cpu")), scratch((size,), torch.uint8, torch.device("cpu"))

    def call(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with lend(workspace):
            return [pair(size) for size in sizes]

    workspace = buffer(4096)
    first, again, other = call(8, 8), call(8, 8), call(16, 8)
    assert all(one is same for one, same in zip(first, again, strict=True))
    assert [tensor.data_ptr() - workspace.buffer.data_ptr() for tensor in (*first[0], *first[1], *other[1])] == [0, 256, 512, 768, 512, 768]
    assert other[0] is not first[0] and other[1] is first[1]  # behind the other one the same place is free
    large = call(3000)[0]
    assert call(3000)[0] is not large and large[1].data_ptr() != call(3000)[0][1].data_ptr()
    assert pair(8) is not pair(8)  # no workspace


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda workspace: pickle.loads(pickle.dumps(workspace))], ids=["deepcopy", "pickle"])
def test_a_copy_has_memory_of_its_own(copied: Callable[[hb.Workspace], hb.Workspace]) -> None:
    workspace = buffer(4096)
    with lend(workspace):
        scratch((8,), torch.float32, torch.device("cpu")).fill_(1)
    other = copied(workspace)
    with lend(other):
        scratch((8,), torch.float32, torch.device("cpu")).fill_(2)
    assert workspace.buffer[:32].view(torch.float32).tolist() == [1.0] * 8 and other.buffer[:32].view(torch.float32).tolist() == [2.0] * 8


@pytest.mark.parametrize("given", [torch.empty(8), torch.empty((2, 8), dtype=torch.uint8), torch.empty(16, dtype=torch.uint8)[::2]])
def test_only_bytes_in_a_row_are_a_workspace(given: torch.Tensor) -> None:
    with pytest.raises(InputError, match="buffer of bytes"):
        hb.Workspace(given)


def taken(workspace: hb.Workspace) -> int:
    return workspace._used


SIZES = (1, 2, 8, 9, 16, 40, 130, 300, 700, 1600, 5000)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("activations", ACTIVATION_FORMATS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 64), (160, 96), (64, 2880)])
def test_a_call_takes_at_most_what_was_said_and_never_much_less(hidden: int, intermediate: int, activations: Any, batch_invariant: bool) -> None:
    pytest.importorskip("triton")
    from compile_only import compiling

    layout = "hopper_fp8" if activations == "fp8" else "hopper"
    experts = replace(hb.prepare(make_experts(EXPERTS, hidden, intermediate, hb.NVFP4), layout, activations=activations), target=HOPPER)
    options: dict[str, Any] = {"batch_invariant": batch_invariant}
    for num_tokens in SIZES:
        x = torch.zeros((num_tokens, hidden), dtype=torch.bfloat16)
        ids, weights = torch.zeros((num_tokens, TOP_K), dtype=torch.int32), torch.zeros((num_tokens, TOP_K))
        workspace = buffer(1 << 26)
        with compiling(90), without_compiling():
            hb.fused_moe(x, experts, ids, weights, workspace=workspace, **options)
        said = hb.workspace_nbytes(experts, num_tokens, TOP_K, **options)
        smaller = hb.workspace_nbytes(experts, max(1, num_tokens // 8), TOP_K, **options)
        assert taken(workspace) <= said <= 1.5 * max(taken(workspace), smaller) + 4096, num_tokens


def without_compiling() -> Any:
    """Triton asks a hook before it compiles; this one says no."""
    import triton

    context = pytest.MonkeyPatch.context()

    class Patched:
        def __enter__(self) -> None:
            self.patch = context.__enter__()
            self.patch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **others: True)

        def __exit__(self, *error: Any) -> None:
            context.__exit__(*error)

    return Patched()


def test_no_workspace_under_a_kernel_that_takes_none() -> None:
    w = make_experts(EXPERTS, 64, 32, hb.MXFP4)
    p, x = hb.prepare(w), torch.randn(3, 64).bfloat16()
    routing = hb.route(torch.randn(3, EXPERTS), TOP_K)
    assert torch.equal(hb.fused_moe(x, p, *routing, workspace=buffer(64)), hb.fused_moe(x, p, *routing))
    assert hb.workspace_nbytes(p, 100, TOP_K) == 0


@on_hopper
@pytest.mark.parametrize("activations", ACTIVATION_FORMATS)
def test_results_do_not_change_and_nothing_else_is_allocated(activations: Any) -> None:
    experts = hb.prepare(make_experts(EXPERTS, 320, 192, hb.NVFP4).to("cuda"), activations=activations)
    workspace = buffer(hb.workspace_nbytes(experts, 5000, TOP_K) + 256, "cuda")
    for num_tokens in SIZES:
        x = torch.randn(num_tokens, 320, device="cuda").bfloat16()
        routing = hb.route(torch.randn(num_tokens, EXPERTS, device="cuda"), TOP_K)
        expected, out = hb.fused_moe(x, experts, *routing), torch.empty_like(x)
        workspace.buffer.fill_(0xFF)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        hb.fused_moe(x, experts, *routing, out=out, workspace=workspace)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        assert torch.equal(out, expected)
