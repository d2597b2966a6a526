"""What Hopper's fp8 tensor cores round off FP4 experts, as `halfbyte inspect` and `halfbyte prepare` report it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from halfbyte.checkpoint import Checkpoint


def describe_layer(checkpoint: Checkpoint, layer: int, device: torch.device | str = "cpu", experts: range | None = None) -> list[dict[str, Any]]:
    """One JSON-able row for each of the matrices "w13" and "w2": the relative L2 error, and the rows that are not exact. Empty for dense experts."""
    from halfbyte.eval.fp8_weights import fp8_weight_error

    return [
        {"layer": layer, "matrix": name, "relative": error.relative, "rounded_rows": error.rows, "rows": error.total_rows}
        for name, error in fp8_weight_error(checkpoint, layer, device=device, experts=experts).items()
    ]


def render(row: dict[str, Any]) -> str:
    """A line of text."""
    cost = f"{row['relative']:.3%} of the weights' norm, {row['rounded_rows']:,} of {row['rows']:,} rows are rounded"
    return f"  layer {row['layer']:>3}  {row['matrix']:<3}  fp8 tensor cores: {cost if row['rounded_rows'] else 'exact'}"
