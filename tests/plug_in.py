"""A packed checkpoint through the transformers plug-in, beside the stock model of the values that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import assert_close_rel
from saved_models import assert_same_checkpoint

import halfbyte.integrations.transformers  # noqa: F401  # registers halfbyte
from halfbyte.integrations.packing import is_attached

IDS = torch.arange(22).view(2, 11) * 7 % 61
# fp32 against fp32: only the order of sums differs.
EXACT = {"token": 1e-5, "overall": 1e-5}


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Logits of a model with a head, the last hidden states of another: [tokens, width] fp32."""
    out = model.eval()(IDS, use_cache=False)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).float().flatten(0, 1)


def check_plug_in(packed: Path, dense: Path, model_class: Any, *, absent: frozenset[str] = frozenset()) -> None:
    """Load `packed` through the plug-in and `dense`, of the values that it means, through stock transformers; both must compute the same.

    What the packed model saves are the files that it came from, without `absent`: tensors that nothing reads.

    Raises:
        HalfbyteError: the plug-in refuses the checkpoint.
    """
    loaded = model_class.from_pretrained(packed, dtype=torch.float32)
    assert any(is_attached(module) for module in loaded.modules()), "no experts are packed"
    expected = model_class.from_pretrained(dense, dtype=torch.float32, experts_implementation="eager")
    assert_close_rel(outputs(loaded), outputs(expected), **EXACT)
    saved = packed.with_name(packed.name + " saved")
    loaded.save_pretrained(saved)
    assert_same_checkpoint(saved, packed, absent=absent)
