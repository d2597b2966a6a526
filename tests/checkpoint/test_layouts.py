"""Experts in every layout of `checkpoint.projections`: the same matrices, whatever holds them, and nothing of a layer left out."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files as cf
import pytest
import torch

from halfbyte.checkpoint import Checkpoint, load_experts
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import NVFP4, QuantTensor, quantize

E, H, I = cf.E, cf.H, cf.I  # noqa: E741
LAYER = "model.layers.1.mlp"
RELU2 = {"model_type": "novel_moe", "num_hidden_layers": 2, "hidden_act": "relu2"}
NOVEL = {"model_type": "novel_moe", "num_hidden_layers": 2, "hidden_act": "silu"}


def matrices(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(E, rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


GATE, UP, DOWN = matrices(I, H, 0), matrices(I, H, 1), matrices(H, I, 2)
GATE_UP = torch.cat([GATE, UP], 1)
EXPERTS = f"{LAYER}.experts"
GRANITE = "model.layers.1.block_sparse_moe"
DENSE = {
    "stacked": ({f"{EXPERTS}.gate_up_proj": GATE_UP, f"{EXPERTS}.down_proj": DOWN}, NOVEL),
    "transposed": ({f"{EXPERTS}.gate_up_proj": GATE_UP.mT, f"{EXPERTS}.down_proj": DOWN.mT}, NOVEL),
    "three": ({f"{EXPERTS}.gate_proj": GATE, f"{EXPERTS}.up_proj": UP, f"{EXPERTS}.down_proj": DOWN}, NOVEL),
    "granite": ({f"{GRANITE}.input_linear.weight": GATE_UP, f"{GRANITE}.output_linear.weight": DOWN}, NOVEL),
    "without gate": ({f"{EXPERTS}.{e}.{n}.weight": m[e] for e in range(E) for n, m in (("up_proj", UP), ("down_proj", DOWN))}, RELU2),
    "stacked without gate": ({f"{EXPERTS}.up_proj": UP, f"{EXPERTS}.down_proj": DOWN}, RELU2),
    "flat": (
        {f"transformer.blocks.1.ffn.experts.mlp.{n}": m.flatten(0, 1) for n, m in (("w1", GATE), ("v1", UP), ("w2", DOWN.mT.contiguous()))},
        {"model_type": "dbrx", "n_layers": 2, "d_model": H, "ffn_config": {"moe_num_experts": E, "moe_top_k": 2, "ffn_hidden_size": I}},
    ),
}


def files_of(tensors: dict[str, torch.Tensor], config: dict) -> cf.Files:
    files = cf.dense()
    files.tensors, files.config = {name: tensor.contiguous() for name, tensor in tensors.items()}, dict(config)
    return files


@pytest.mark.parametrize("layout", DENSE)
def test_the_same_matrices_in_every_layout(tmp_path: Path, layout: str) -> None:
    tensors, config = DENSE[layout]
    w = load_experts(files_of(tensors, config).write(tmp_path), 1)
    assert torch.equal(w.w13, UP if "without" in layout else GATE_UP)
    assert torch.equal(w.w2, DOWN)


@pytest.mark.parametrize("layout", DENSE)
def test_tensors_of_every_layout_have_a_use(tmp_path: Path, layout: str) -> None:
    tensors, config = DENSE[layout]
    first = next(iter(tensors))
    checkpoint = Checkpoint.open(files_of({**tensors, f"{first}_odd": torch.ones(4)}, config).write(tmp_path))
    with pytest.raises(UnsupportedError, match=f"{first}_odd"):
        load_experts(checkpoint, 1)


def nvfp4_stacked(transposed: bool, per_expert: bool) -> tuple[dict[str, torch.Tensor], QuantTensor, QuantTensor]:
    """ModelOpt's form of stacked experts; gate and up share a global scale, as do all experts where they have one scale."""
    tensors, wanted = {}, []
    for name, dense in (("gate_up_proj", GATE_UP), ("down_proj", DOWN)):
        scale = dense.float().abs().flatten(0 if not per_expert else 1).amax(-1).expand(E) / (6 * 448)
        parts = [quantize(dense[e], NVFP4, global_scale=scale[e]) for e in range(E)]
        codes, scales = torch.stack([q.codes for q in parts]), torch.stack([q.scales for q in parts])
        wanted.append(QuantTensor(codes, scales, scale.clone(), NVFP4))
        place = f"{EXPERTS}.{name}"
        tensors[place] = codes.mT if transposed else codes
        tensors[f"{place}_weight_scale"] = scales.view(torch.uint8).mT.contiguous().view(scales.dtype) if transposed else scales
        tensors[f"{place}_weight_scale_2"] = scale.clone() if per_expert else scale[0].clone()
        tensors[f"{place}_input_scale"] = torch.arange(1.0, E + 1) if per_expert else torch.tensor(0.5)
    return tensors, wanted[0], wanted[1]


MODELOPT = {**cf.QWEN, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}}


def modelopt(tensors: dict[str, torch.Tensor]) -> cf.Files:
    others = {name: tensor for name, tensor in cf.dense().tensors.items() if ".experts." not in name}
    return files_of({**others, **tensors}, MODELOPT)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_expert", [False, True])
def test_stacked_nvfp4(tmp_path: Path, transposed: bool, per_expert: bool) -> None:
    tensors, w13, w2 = nvfp4_stacked(transposed, per_expert)
    w = load_experts(modelopt(tensors).write(tmp_path), 1)
    for given, wanted in ((w.w13, w13), (w.w2, w2)):
        assert isinstance(given, QuantTensor) and given.global_scale is not None and wanted.global_scale is not None
        assert torch.equal(given.codes, wanted.codes) and torch.equal(given.scales.view(torch.uint8), wanted.scales.view(torch.uint8))
        assert torch.equal(given.global_scale.view(E, -1), wanted.global_scale[:, None].expand(E, given.global_scale.numel() // E))
    inputs = torch.arange(1.0, E + 1) if per_expert else torch.full((E,), 0.5)
    assert w.w13_input_scale is not None and w.w2_input_scale is not None
    assert torch.equal(w.w13_input_scale, inputs[:, None].expand(E, 2)) and torch.equal(w.w2_input_scale, inputs)


def test_a_pruned_stacked_expert_and_a_missing_input_scale(tmp_path: Path) -> None:
    tensors, _, _ = nvfp4_stacked(False, True)
    tensors[f"{EXPERTS}.down_proj"][2] = 0x80
    tensors[f"{EXPERTS}.down_proj_weight_scale_2"][2] = 0
    del tensors[f"{EXPERTS}.down_proj_input_scale"]
    checkpoint = Checkpoint.open(modelopt(tensors).write(tmp_path / "pruned"))
    w = load_experts(checkpoint, 1)
    assert isinstance(w.w2, QuantTensor) and w.w2.global_scale is not None
    assert float(w.w2.global_scale[2]) == 1 and w.w13_input_scale is not None and w.w2_input_scale is None
    tensors[f"{EXPERTS}.down_proj_weight_scale_2"][1] = 0
    with pytest.raises(CheckpointError, match="not a positive finite number"):
        load_experts(modelopt(tensors).write(tmp_path / "zero"), 1)


def test_awq_is_refused_by_name(tmp_path: Path) -> None:
    files = cf.nvfp4("modelopt")
    files.tensors[f"{EXPERTS}.0.down_proj.pre_quant_scale"] = torch.ones(I)
    with pytest.raises(UnsupportedError, match=r"channel by channel: .*0\.down_proj\.pre_quant_scale"):
        load_experts(files.write(tmp_path), 1)
