"""Whatever happens to any one tensor of a checkpoint, it is either told by name or without effect: what is read stays what it was.

Each tensor of each tiny checkpoint is deleted, renamed, duplicated, recast and reshaped, in every way of `changes`. Expected values were decoded
element by element when the checkpoint was made (`checkpoint_files`). CI takes `SAMPLE` changes of each checkpoint, the same ones each time. All of
them, some 50,000, or those of the checkpoints named:

    PYTHONPATH=src:tests python tests/checkpoint/test_any_one_tensor.py [NAME ...]
"""

from __future__ import annotations

import logging
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import checkpoint_files as cf
import pytest
import torch

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint, find_defects
from halfbyte.errors import CheckpointError, HalfbyteError, UnsupportedError

SAMPLE = 25
LAYER = 1
Tensors = dict[str, torch.Tensor]


class Known(NamedTuple):
    """A sound checkpoint and what it means."""

    files: cf.Files
    values: Tensors  # by the names of `read`


def dense_values(files: cf.Files) -> Tensors:
    """Of calibrated checkpoints the input scales too: 2^(-8 - expert - projection), as `checkpoint_files` makes them."""
    values = {"w13": files.w13 if files.dense["gate"] else torch.stack(files.dense["up"]), "w2": files.w2}
    if any(re.search(r"input_(global_)?scale$", name) for name in files.tensors):
        projections = 3 if files.dense["gate"] else 2
        scales = torch.tensor([[2.0 ** (-8 - expert - number) for number in range(projections)] for expert in range(cf.E)])
        values |= {"w13_input_scale": scales[:, :-1].reshape((cf.E, 2) if projections == 3 else (cf.E,)), "w2_input_scale": scales[:, -1]}
    return values


def router_values(files: cf.Files, **names: str) -> Tensors:
    return {part: files.tensors[name].float() for part, name in names.items()}


def known(make: Callable[[], cf.Files], block: str = "model.layers.1.mlp", **router: str) -> Callable[[], Known]:
    def build() -> Known:
        files = make()
        names = {"router": "gate.weight", **router}
        return Known(files, {**dense_values(files), **router_values(files, **{part: f"{block}.{leaf}" for part, leaf in names.items() if leaf})})

    return build


def deepseek_v3() -> cf.Files:
    files = cf.nvfp4("modelopt", config=cf.DEEPSEEK_V3)
    files.tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.randn(cf.E)
    return files


def predicting() -> Known:
    """DeepSeek-V3 with the layer that predicts a second token, its experts in bf16 as NVIDIA publishes it."""
    files = deepseek_v3()
    files.config["num_nextn_predict_layers"] = 1
    files.hf_quant_config["quantization"]["exclude_modules"] += ["model.layers.2.*"]
    head = cf.dense(cf.DEEPSEEK_V3, block="model.layers.2.mlp")
    files.tensors |= head.tensors
    files.tensors["model.layers.2.mlp.gate.e_score_correction_bias"] = torch.randn(cf.E)
    model = known(lambda: files, **CORRECTION)()
    behind = {"w13": head.w13, "w2": head.w2}
    behind |= router_values(files, router="model.layers.2.mlp.gate.weight", correction_bias="model.layers.2.mlp.gate.e_score_correction_bias")
    return Known(files, {**model.values, **{f"{name} of layer 2": value for name, value in behind.items()}})


def fp8_block() -> cf.Files:
    files = cf.dense({**cf.QWEN, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    for projection, leaf in cf.NAMES.items():
        for expert in range(cf.E):
            name = f"model.layers.1.mlp.experts.{expert}.{leaf}.weight"
            stored = files.tensors[name].to(torch.float8_e4m3fn)
            files.tensors |= {name: stored, f"{name}_scale_inv": torch.full((1, 1), 0.25 + expert)}
            files.dense[projection][expert] = (stored.float() * (0.25 + expert)).bfloat16().float()
    return files


def deepseek_v4(scale_dtype: torch.dtype, scale_name: str, hashed: bool) -> cf.Files:
    files = cf.deepseek_v4(scale_dtype, scale_name)
    files.config["mlp_layer_types"] = ["dense", "hash_moe" if hashed else "moe"]
    del files.tensors["layers.1.ffn.gate.bias" if hashed else "layers.1.ffn.gate.tid2eid"]
    return files


def gpt_oss() -> Known:
    files, w13_bias, w2_bias = cf.gpt_oss()
    prefix = "model.layers.1.mlp.router"
    router = router_values(files, router=f"{prefix}.weight", logit_bias=f"{prefix}.bias")
    return Known(files, {**dense_values(files), "w13_bias": w13_bias.float(), "w2_bias": w2_bias.float(), **router})


def biased() -> Known:
    """gpt-oss with experts one by one, each matrix with a bias."""
    files = cf.nvfp4("compressed-tensors", config=cf.GPT_OSS)
    files.tensors["model.layers.1.mlp.router.weight"] = files.tensors.pop("model.layers.1.mlp.gate.weight")
    files.tensors["model.layers.1.mlp.router.bias"] = torch.randn(cf.E).bfloat16()
    biases = {leaf: torch.randn(cf.E, cf.rows_columns(part)[0]).bfloat16() for part, leaf in cf.NAMES.items()}
    files.tensors |= {f"model.layers.1.mlp.experts.{e}.{leaf}.bias": bias[e].clone() for leaf, bias in biases.items() for e in range(cf.E)}
    values = {"w13_bias": torch.cat([biases["gate_proj"], biases["up_proj"]], 1).float(), "w2_bias": biases["down_proj"].float()}
    prefix = "model.layers.1.mlp.router"
    return Known(files, {**dense_values(files), **values, **router_values(files, router=f"{prefix}.weight", logit_bias=f"{prefix}.bias")})


def transposed_stacks() -> cf.Files:
    """ModelOpt's stacked experts with rows and columns exchanged, in codes and scales."""
    files = cf.stacked(cf.nvfp4("modelopt"))
    for name in [name for name in files.tensors if ".experts." in name and files.tensors[name].ndim == 3]:
        tensor = files.tensors[name]
        files.tensors[name] = tensor.view(torch.uint8).mT.contiguous().view(tensor.dtype)
    return files


def in_place(leaves: dict[str, str], block: str, config: dict, suffix: str = "") -> cf.Files:
    """bf16 experts stacked right in their module: gate and up in one, or apart."""
    files = cf.dense(config, stacked="rows")
    gate_up, down = (files.tensors.pop(f"model.layers.1.mlp.experts.{leaf}") for leaf in ("gate_up_proj", "down_proj"))
    router = files.tensors.pop("model.layers.1.mlp.gate.weight")
    parts = {"gate_up": gate_up, "gate": gate_up[:, : cf.I].clone(), "up": gate_up[:, cf.I :].clone(), "down": down}
    files.tensors |= {f"{block}.{leaf}{suffix}": parts[part] for part, leaf in leaves.items()} | {f"{block}.router.layer.weight": router}
    return files


def dbrx() -> cf.Files:
    sizes = {"moe_num_experts": cf.E, "moe_top_k": 2, "ffn_hidden_size": cf.I}
    config = {"model_type": "dbrx", "n_layers": 2, "d_model": cf.H, "ffn_config": sizes}
    files = in_place({"gate": "experts.mlp.w1", "up": "experts.mlp.v1", "down": "experts.mlp.w2"}, "transformer.blocks.1.ffn", config)
    for name in [name for name in files.tensors if ".mlp." in name]:
        files.tensors[name] = (files.tensors[name].mT if name.endswith("w2") else files.tensors[name]).flatten(0, 1).contiguous()
    files.tensors["transformer.blocks.0.norm.weight"] = torch.ones(cf.H)
    return files


def without_gate() -> cf.Files:
    """Nemotron-H: two matrices per expert."""
    config = {**cf.DEEPSEEK_V3, "model_type": "nemotron_h", "mlp_hidden_act": "relu2", "layers_block_type": ["attention", "moe"]}
    files = cf.nvfp4("modelopt", names={"up": "up_proj", "down": "down_proj"}, config=config)
    files.tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.randn(cf.E)
    return files


def unknown(files: cf.Files) -> cf.Files:
    kept = {key: value for key, value in files.config.items() if key in ("quantization_config", "num_hidden_layers", "num_experts")}
    files.config = {"model_type": "novel_moe", "hidden_act": "silu", **kept}
    return files


def reordered() -> cf.Files:
    """The projection before the number of the expert, as ModelOpt 0.43 writes Qwen3-VL-MoE."""
    files = cf.nvfp4("modelopt")
    files.tensors = {re.sub(r"experts\.(\d)\.(\w+_proj)", r"experts.\2.\1", name): tensor for name, tensor in files.tensors.items()}
    return files


CORRECTION = {"correction_bias": "gate.e_score_correction_bias"}
V4 = {"block": "layers.1.ffn", "correction_bias": "gate.bias"}
CHECKPOINTS: dict[str, Callable[[], Known]] = {
    "modelopt": known(lambda: cf.nvfp4("modelopt")),
    "nvfp4-pack": known(lambda: cf.nvfp4("compressed-tensors")),
    "mxfp4-pack": known(cf.compressed_tensors_mxfp4),
    "quark": known(cf.quark),
    "gpt-oss": gpt_oss,
    "biases": biased,
    "deepseek-v3": known(deepseek_v3, **CORRECTION),
    "predicting": predicting,
    "deepseek-v4 bytes": known(lambda: deepseek_v4(torch.uint8, "scale", False), **V4),
    "deepseek-v4 e8m0": known(lambda: deepseek_v4(torch.float8_e8m0fnu, "weight_scale_inv", False), **V4),
    "deepseek-v4 fp32": known(lambda: deepseek_v4(torch.float32, "scale", True), block="layers.1.ffn", token_experts="gate.tid2eid"),
    "mixtral": known(lambda: cf.nvfp4("modelopt", "model.layers.1.block_sparse_moe", cf.W_NAMES, cf.MIXTRAL), "model.layers.1.block_sparse_moe"),
    "without gate": known(without_gate, **CORRECTION),
    "reordered": known(reordered),
    "stacked modelopt": known(lambda: cf.stacked(cf.nvfp4("modelopt"))),
    "stacked modelopt, transposed": known(transposed_stacks),
    "stacked nvfp4-pack": known(lambda: cf.stacked(cf.nvfp4("compressed-tensors"))),
    "stacked mxfp4-pack": known(lambda: cf.stacked(cf.compressed_tensors_mxfp4())),
    "bf16": known(cf.dense),
    "fp32": known(lambda: cf.dense(dtype=torch.float32)),
    "fp8 blocks": known(fp8_block),
    "stacked bf16": known(lambda: cf.dense(stacked="rows")),
    "stacked bf16, transposed": known(lambda: cf.dense(stacked="columns")),
    "granite": known(
        lambda: in_place(
            {"gate_up": "input_linear", "down": "output_linear"},
            "model.layers.1.block_sparse_moe",
            {**cf.MIXTRAL, "model_type": "granitemoe", "num_hidden_layers": 2},
            ".weight",
        ),
        "model.layers.1.block_sparse_moe",
        router="router.layer.weight",
    ),
    "dbrx": known(dbrx, "transformer.blocks.1.ffn", router="router.layer.weight"),
    "unknown modelopt": known(lambda: unknown(cf.nvfp4("modelopt")), router=""),
    "unknown mxfp4-pack": known(lambda: unknown(cf.compressed_tensors_mxfp4()), router=""),
    "unknown bf16": known(lambda: unknown(cf.dense()), router=""),
    "unknown stacked bf16": known(lambda: unknown(cf.dense(stacked="rows")), router=""),
}


@cache
def checkpoint_of(name: str) -> Known:
    torch.manual_seed(0)
    made = CHECKPOINTS[name]()
    if "mlp_only_layers" not in made.files.config and not name.startswith("unknown"):
        made.files.config.setdefault("mlp_layer_types", ["dense", "sparse"])  # layer 0 has no tensors
    return made


SUFFIXES = (
    ".weight", ".weight_packed", ".weight_scale", ".weight_scale_2", ".weight_global_scale", ".weight_scale_inv", ".input_scale",
    ".input_global_scale", ".scale", ".bias", ".pre_quant_scale", ".weight_zero_point", "_blocks", "_scales", "_bias", "_packed", "_scale",
    "_global_scale", "_weight_scale", "_weight_scale_2", "_input_scale", "_pre_quant_scale", "_scale_inv", "", "x",
)  # fmt: skip
LEAVES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "v1", "input_linear", "output_linear", "e_score_correction_bias")
WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bool)


def other_names(name: str) -> Iterator[str]:
    """What a tensor may be called by mistake."""
    stem, suffix = next(((name.removesuffix(end), end) for end in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(end)), (name, ""))
    yield from (stem + other for other in SUFFIXES if other != suffix)
    for leaf in LEAVES:
        yield re.sub(rf"\b({'|'.join(LEAVES)})(?=[._]|$)", leaf, name)
    for old, new in (
        ("layers.1.", "layers.0."), ("layers.1.", "layers.2."), ("layers.1.", "layers.3."), ("layers.1.", "layers.01."), ("blocks.1.", "blocks.0."),
        ("experts.2.", "experts.3."), ("experts.0.", "experts.3."), ("experts.1.", "experts.01."), ("experts.1.", "experts.99999999999."),
        ("experts.", "experts.0."), ("experts.", "shared_experts."), ("experts.", "expert."), ("model.", ""), ("gate.", "router."), ("mlp.", "moe."),
    ):  # fmt: skip
        yield name.replace(old, new, 1)
    yield from (f"backup.{name}", f"mtp.{name}", name.upper())


def recast(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Other dtypes: by value, and with the same bytes. What merely rounds values is another checkpoint, and a sound one."""
    is_byte = tensor.element_size() == 1
    if is_byte:
        yield from (tensor.view(dtype) for dtype in BYTES if dtype not in (tensor.dtype, torch.bool))
    value = tensor.float() if is_byte and tensor.is_floating_point() else tensor
    for dtype in WIDE:
        if dtype != tensor.dtype and (not dtype.is_floating_point or torch.equal(value.to(dtype).double(), value.double())):
            yield value.to(dtype)
    if not is_byte and tensor.is_floating_point():
        yield from (tensor.float().to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8, torch.bool))


def reshaped(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor[None]
    if tensor.ndim:
        yield tensor.flatten()[:-1].clone()
        yield tensor.reshape(*tensor.shape, 1)
    if tensor.ndim > 1:
        yield tensor.flatten()
        yield tensor[:-1].clone()
        yield torch.cat([tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor] * 2).view(tensor.dtype)
    if tensor.numel() == 1:
        yield tensor.reshape(())
        yield tensor.reshape(1, 1)


class Change(NamedTuple):
    kind: str
    name: str
    other: str = ""  # the new name
    tensor: torch.Tensor | None = None

    def apply(self, tensors: Tensors) -> Tensors:
        changed = dict(tensors)
        if self.kind in ("delete", "rename"):
            del changed[self.name]
        if self.kind in ("rename", "duplicate"):
            changed[self.other] = tensors[self.name].clone()
        if self.tensor is not None:
            changed[self.name] = self.tensor.contiguous()
        return changed

    def __str__(self) -> str:
        what = f"{self.tensor.dtype} {tuple(self.tensor.shape)}" if self.tensor is not None else self.other
        return f"{self.kind} {self.name} {what}"


def changes(tensors: Tensors) -> Iterator[Change]:
    for name, tensor in tensors.items():
        yield Change("delete", name)
        for other in dict.fromkeys(other_names(name)):
            if other not in tensors:
                yield from (Change("rename", name, other), Change("duplicate", name, other))
        yield from (Change("recast", name, tensor=other) for other in recast(tensor))
        yield from (Change("reshape", name, tensor=other) for other in reshaped(tensor) if other.shape != tensor.shape)


def read(checkpoint: Checkpoint) -> Tensors:
    """Everything that the library reads of the layer, and of one that predicts further tokens."""
    values = read_layer(checkpoint, LAYER)
    for layer in checkpoint.moe.predicting_layers:
        values |= {f"{name} of layer {layer}": value for name, value in read_layer(checkpoint, layer).items()}
    return values


def read_layer(checkpoint: Checkpoint, layer: int) -> Tensors:
    """In fp32, whatever the files have."""
    w = hb.load_experts(checkpoint, layer)
    hb.prepare(w, "canonical")
    values = {"w13": w.dequantize().w13, "w2": w.dequantize().w2, "w13_bias": w.w13_bias, "w2_bias": w.w2_bias}
    values |= {"w13_input_scale": w.w13_input_scale, "w2_input_scale": w.w2_input_scale}
    if checkpoint.moe.routing is not None:
        router = hb.load_router(checkpoint, layer)
        values |= {"router": router.weight, "logit_bias": router.logit_bias}
        values |= {"correction_bias": router.correction_bias, "token_experts": router.token_experts}
    return {name: value.float() for name, value in values.items() if value is not None}


def judge(original: Known, change: Change, folder: Path) -> str | None:
    """Read the changed checkpoint: None where the change is told by name or without effect, else what is wrong."""
    files = cf.Files(original.files.config, change.apply(original.files.tensors), hf_quant_config=original.files.hf_quant_config)
    files.write(folder)
    told = ""
    try:
        checkpoint = Checkpoint.open(folder)
        values = read(checkpoint)
    except (CheckpointError, UnsupportedError) as error:
        told = str(error)
    except HalfbyteError as error:
        return f"{type(error).__name__}, which is for wrong arguments: {error}"
    found = []
    try:
        found = find_defects(Checkpoint.open(folder))
        defects = "; ".join(defect.message for defect in found if defect.severity == "error")
    except HalfbyteError as error:
        defects = str(error)
    if bool(told) != bool(defects):
        return f"load says {told!r}, inspect {defects!r}"
    if told:
        names = [name for name in (change.name, change.other) if name]
        return None if any(is_named(name, told) for name in names) else f"not named: {told}"
    expected = original.values
    if change.name.endswith("scale") and any(defect.severity == "warning" and is_named(change.name, defect.message) for defect in found):
        values, expected = ({name: value for name, value in of.items() if "input_scale" not in name} for of in (values, expected))  # others stand in
    if values.keys() != expected.keys():
        return f"read {sorted(values)}, not {sorted(expected)}"
    different = [name for name, value in values.items() if not torch.equal(value, expected[name])]
    return f"silently other values of {different}" if different else None


def is_named(name: str, text: str) -> bool:
    """As a whole word: experts.1.up_proj.weight_scale_2 does not name experts.1.up_proj.weight_scale."""
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", text) is not None


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_change_is_told_or_without_effect(name: str, tmp_path: Path) -> None:
    original = checkpoint_of(name)
    all_changes = list(changes(original.files.tensors))
    for change in random.Random(name).sample(all_changes, min(SAMPLE, len(all_changes))):
        problem = judge(original, change, tmp_path)
        assert problem is None, f"{change}: {problem}"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_checkpoint_itself_is_sound(name: str, tmp_path: Path) -> None:
    original = checkpoint_of(name)
    assert judge(original, Change("none", next(iter(original.files.tensors))), tmp_path) is None


def test_the_judge_can_fail(tmp_path: Path) -> None:
    """Values, names and inspect are really compared."""
    original = checkpoint_of("modelopt")
    name = "model.layers.1.mlp.experts.1.up_proj.weight_scale_2"
    other = judge(original, Change("recast", name, tensor=2 * original.files.tensors[name]), tmp_path)
    assert other == "silently other values of ['w13']"
    assert "not named" in str(judge(original, Change("delete", name)._replace(name=name), tmp_path) or "not named")
    assert is_named("a.b", "x a.b: y") and is_named("a.b", "missing a.b.") and not is_named("a.b", "a.b_scale") and not is_named("a.b", "c.a.b")


def main(names: list[str]) -> int:
    """Every change of these checkpoints, all by default; the number of those that are not as they should be."""
    logging.disable()
    failed = 0
    for name in names or CHECKPOINTS:
        original, seen = checkpoint_of(name), dict[str, int]()
        all_changes = list(changes(original.files.tensors))
        with tempfile.TemporaryDirectory() as folder:
            for change in all_changes:
                if problem := judge(original, change, Path(folder)):
                    failed += 1
                    rule = re.sub(r"\d+", "N", f"{change.kind} {problem}")[:60]
                    seen[rule] = seen.get(rule, 0) + 1
                    if seen[rule] <= 3:
                        print(f"{name}: {change}: {problem}")
        print(f"{name}: {len(all_changes)} changes, {sum(seen.values())} wrong", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
