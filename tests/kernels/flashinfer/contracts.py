"""What halfbyte calls in FlashInfer, read from FlashInfer's source: PYTHONPATH=tests python contracts.py FOLDER [RELEASE.json]

FOLDER        the package `flashinfer`: of a source tree, of an unpacked wheel, or where an installed one lies
RELEASE.json  where the facts go; without it the calls are bound to the functions of this release, whichever it is, the order of rows is compared with
              that of its own functions, and its facts with those in releases/, if it is there

Facts only: names of parameters, and numbers of enumerations.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flashinfer_stand_in as stand_in
import torch
from engine_sources import record_or_compare, version_of
from random_experts import make_experts

import halfbyte as hb
from halfbyte.kernels.flashinfer import arguments
from halfbyte.kernels.flashinfer.fused_moe import KERNELS

Facts = dict[str, Any]


def facts_of(package: Path) -> Facts:
    """{"functions": {name: {"parameters": [...], "required": [...]}}, "activation_types": {name: number}, "exported": [...]}."""
    functions = {node.name: _described(node) for node in _definitions(package / "fused_moe" / "core.py", ast.FunctionDef) if node.name in CALLED}
    (kinds,) = (node for node in _definitions(package / "tllm_enums.py", ast.ClassDef) if node.name == "ActivationType")
    numbers = {
        target.id: ast.literal_eval(item.value)
        for item in kinds.body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    named = {kind for kernel in KERNELS.values() for kinds_of in kernel.kinds.values() for kind in kinds_of.values()}
    imported = {alias.name for node in ast.walk(_parsed(package / "__init__.py")) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {
        "functions": functions,
        "activation_types": {name: number for name, number in numbers.items() if name in named},
        "exported": sorted(imported & {*CALLED, "ActivationType"}),
    }


CALLED = {kernel.function for kernel in KERNELS.values()}


def _described(function: ast.FunctionDef) -> dict[str, list[str]]:
    given = function.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    required = positional[: len(positional) - len(given.defaults)]
    required += [argument.arg for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    return {"parameters": positional + [argument.arg for argument in given.kwonlyargs], "required": required}


def _definitions(file: Path, kind: type) -> Iterator[Any]:
    return (node for node in _parsed(file).body if isinstance(node, kind))


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def bind(facts: Facts) -> None:
    """Bind what the provider hands over to the functions of a release. Raises TypeError or AssertionError where they do not fit."""
    for layout, kernel in KERNELS.items():
        described = facts["functions"][kernel.function]
        signature = inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if name in described["required"] else None)
                for name in described["parameters"]
            ]
        )
        for format in (hb.NVFP4, hb.MXFP4):
            experts = hb.prepare(make_experts(1, 64, 64, format), layout).storage
            ids, weights, output = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), torch.empty(1, 64)
            named = kernel.arguments(arguments.Rows(torch.zeros(1, 64, dtype=torch.bfloat16)), experts, ids, weights, 0, output)
            signature.bind(**named, activation_type=3)
    assert {*CALLED, "ActivationType"} == set(facts["exported"])
    for name, number in facts["activation_types"].items():
        assert stand_in.ActivationType[name] == number
    assert len(facts["activation_types"]) == len(stand_in.ActivationType)


# What moves rows, by file: plain torch, which runs without the package.
MOVES_ROWS = {
    "utils.py": ("get_shuffle_matrix_a_row_indices", "get_shuffle_block_size", "srcToDstBlk16RowMap", "srcToDstBlk32RowMap"),
    "fused_moe/core.py": ("reorder_rows_for_gated_act_gemm", "get_reorder_rows_for_gated_act_gemm_row_indices"),
}


def compare_row_order(package: Path) -> None:
    """Raise AssertionError where the release orders rows in another way than the layout."""
    names: dict[str, Any] = {"torch": torch}
    for file, wanted in MOVES_ROWS.items():
        for node in _parsed(package / file).body:
            if isinstance(node, ast.FunctionDef) and node.name in wanted:
                node.decorator_list = []
            elif not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in wanted):
                continue
            exec(f"from __future__ import annotations\n{ast.unparse(node)}", names)
    for rows in (128, 256, 6144):
        matrix = torch.arange(rows).unsqueeze(1)
        shuffle = names["get_shuffle_matrix_a_row_indices"](matrix, 128)
        assert torch.equal(matrix[shuffle].flatten(), hb.trtllm_gen_row_order(rows, gated=False))
        assert torch.equal(names["reorder_rows_for_gated_act_gemm"](matrix)[shuffle].flatten(), hb.trtllm_gen_row_order(rows, gated=True))


if __name__ == "__main__":
    package = Path(sys.argv[1])
    found, releases = facts_of(package), Path(__file__).parent / "releases"
    bind(found)
    compare_row_order(package)
    version = version_of(package)
    if len(sys.argv) > 2 or (releases / f"{version}.json").exists():
        record_or_compare(package, found, releases)
    else:
        print(f"{package.name} {version}: the calls fit")
