"""An index, configurations and tokenizers that say something else than the tensors, or nothing that makes sense."""

from __future__ import annotations

import json
import random
from typing import Any

from fuzz.making import CONFIG, HF_QUANT, Damage, edit_json, maker
from fuzz.sound import SHARDS, TOKENIZER, Files

from halfbyte.checkpoint.source import INDEX


@maker(3)
def odd_index(rng: random.Random, files: Files) -> Damage:
    entries = json.loads(files[INDEX])["weight_map"]
    name = rng.choice(list(entries))
    other = rng.choice(
        (
            "../model.safetensors", "/etc/passwd", "/dev/zero", "missing.safetensors", ".", "..", "", "a/../../b.safetensors", "x" * 300, "x" * 5_000,
            "a\0b", CONFIG, SHARDS[0], SHARDS[1], None, 3, True, [], {}, ["model.safetensors"], "C:\\model.safetensors", "\ud800", "\x1b[2J",
            TOKENIZER, "~/model.safetensors", f"./{SHARDS[0]}", f"//{SHARDS[0]}",
        )
    )  # fmt: skip
    kind = rng.randrange(5)

    def change(index: dict[str, Any]) -> None:
        if kind <= 2:
            index["weight_map"][name] = other
        elif kind == 3:
            del index["weight_map"][name]
        else:
            index["weight_map"] = rng.choice(([], None, "x", 3, {}, [name]))

    edit_json(files, INDEX, change)
    return Damage(f"index: {('entry ' + name, other) if kind <= 2 else ('no entry', name) if kind == 3 else 'odd weight_map'}")


SIZES = (0, -1, 1, 3, 5, 2**31 - 1, 2**31, 2**63, 10**9, 10**18, 10**30, -(10**30), 10**400)
ODD_VALUES = (
    *("four", "4", "", "\x1b[2J", "\ud800", "x" * 100_000, [], [4], [[]], ["x"], [None], {}, {"a": 1}, True, False, 4.5, 1e300, -0.0),
    *(float("nan"), float("inf"), -float("inf")),
)


def paths(document: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    return [path for key, value in pairs for path in ((*before, key), *paths(value, (*before, key)))]


OURS = (
    *("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts", "hidden_size", "moe_intermediate_size", "intermediate_size"),
    *("num_experts_per_tok", "norm_topk_prob", "model_type", "quantization_config", "hidden_act", "mlp_only_layers", "decoder_sparse_step"),
    *("swiglu_limit", "routed_scaling_factor", "scoring_func", "mlp_layer_types", "expert_dtype", "text_config", "num_nextn_predict_layers"),
)


@maker(10)
def odd_configuration(rng: random.Random, files: Files) -> Damage:
    name = rng.choice([CONFIG, CONFIG, CONFIG, *(file for file in (HF_QUANT,) if file in files)])
    document = json.loads(files[name])
    places = paths(document)
    ours = [path for path in places if path[0] in (*OURS, "quantization")] + [(key,) for key in OURS if name == CONFIG]
    path = rng.choice(ours if rng.random() < 0.8 else places)
    value = rng.choice(rng.choice((SIZES, ODD_VALUES, (None,))))
    place = document
    for key in path[:-1]:
        place = place[key]
    before = place.get(path[-1], "absent") if isinstance(place, dict) else place[path[-1]]
    removed = rng.random() < 0.1 and before != "absent"
    if removed:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    files[name] = json.dumps(document).encode()
    same_kind = type(value) is type(before) or (isinstance(value, int | float) and isinstance(before, float))
    legal = "absent" if removed or value is None or value in ([], {}, "") else "configuration" if same_kind or before in ("absent", None) else ""
    return Damage(f"{name}: {'.'.join(map(str, path))} was {before!r}, is {'removed' if removed else repr(value)[:60]}"[:300], legal)


_GROUPS = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}}
_PACK = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
_IGNORED = (
    *("lm_head", 3, ["re:("], ["re:(.+)+#"], ["re:(\\w+\\.?)+!"], ["*"], ["x"] * 100_000, ["*" * 5_000], ["re:" + "a?" * 500 + "a" * 500]),
    *(["[" * 2_000], [3], [f"re:.*{'(a|b)' * 300}"], ["re:a{999999999}"], [None], [""]),
)
OTHER_QUANTIZATIONS = (
    *([], [1], "nvfp4", 4, True, None, {}, {"bits": 4}),
    *({"quant_method": method} for method in ("awq", "gptq", "", "mxfp4", "fp8", "modelopt", "quark", "compressed-tensors", None, 4)),
    *({"quant_method": "fp8", "weight_block_size": size} for size in ([128, 128], [64, 128], [128], 128, "128", [128.0, 128.0])),
    *({**_MODELOPT, **more} for more in ({}, {"quant_algo": "FP8"}, {"quant_algo": 4}, {"group_size": 32}, {"group_size": "16"})),
    *(
        {**_MODELOPT, "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        for layers in ({}, {"a": "NVFP4"}, [1], {"*": {"quant_algo": "FP8"}})
    ),
    {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}}},
    *({**_PACK, "config_groups": groups} for groups in (_GROUPS, {"g": None}, {"g": {"targets": 3}}, {"g": {"targets": [3]}}, [1])),
    *({**_PACK, "format": "mxfp4-pack-quantized", **more} for more in ({}, {"config_groups": _GROUPS})),
    *({**_PACK, "ignore": ignored} for ignored in _IGNORED),
    *({**_MODELOPT, "ignore": ignored} for ignored in _IGNORED),
)
_FURTHER = ({}, {"exclude_modules": ["*"]}, {"exclude_modules": ["*experts*"]}, {"group_size": 32}, {"quantized_layers": {"*": {}}})


@maker(4)
def other_quantization(rng: random.Random, files: Files) -> Damage:
    """What describes the quantisation, taken from another layout or contradicting itself."""
    other = rng.choice(OTHER_QUANTIZATIONS)
    if HF_QUANT in files and rng.random() < 0.5:
        algorithm = rng.choice(("NVFP4", "FP8", "MIXED_PRECISION", "W4A8_AWQ", "", None, 4, [], "nvfp4", "NVFP4_AWQ"))
        further = rng.choice(_FURTHER)
        files[HF_QUANT] = json.dumps({"quantization": {"quant_algo": algorithm, **further}}).encode()
        return Damage(f"{HF_QUANT}: {algorithm!r} {further}")
    if rng.random() < 0.2:
        files[HF_QUANT] = json.dumps({"quantization": {"quant_algo": rng.choice(("NVFP4", "FP8", "MXFP4")), "group_size": 16}}).encode()
        return Damage(f"{HF_QUANT} beside another layout: {files[HF_QUANT].decode()}")
    edit_json(files, CONFIG, lambda config: config.update({"quantization_config": other}))
    return Damage(f"{CONFIG}: quantization_config {str(other)[:160]}")


@maker(2)
def broken_tokenizer(rng: random.Random, files: Files) -> Damage:
    name = rng.choice((TOKENIZER, "tokenizer_config.json"))
    kind = rng.choice(("cut", "empty", "list", "absent", "nested", "binary"))
    half, binary = files[name][: len(files[name]) // 2], b"\xff\x00" * 500
    broken = {"cut": half, "empty": b"", "list": b"[]", "nested": b"[" * 100_000, "binary": binary}
    del files[name]
    files.update({name: broken[kind]} if kind in broken else {})
    return Damage(f"{name}: {kind}", "tokenizer")
