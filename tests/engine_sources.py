"""Facts about an engine, read from its source without running it: names of classes, their attributes and Parameters, parameters of functions.

The plug-ins' tests compare what a plug-in uses with the facts of several releases, which are recorded in small files.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

Relied = Mapping[str, tuple[Collection[str], Collection[str]]]
"""File to the classes and the top-level names of it that a plug-in knows."""


def facts_of(package: Path, relied_on: Relied, methods: Collection[str]) -> dict[str, Any]:
    """{file: {"names": [...], "functions": {...}, "classes": {class: {"methods", "attributes", "parameters", "values"}}}}.

    A file that is not there is left out, and so are the parameters of methods that are not in `methods`.
    """
    facts: dict[str, Any] = {}
    for file, (classes, names) in relied_on.items():
        if not (package / file).exists():
            continue
        tree = ast.parse((package / file).read_text())
        found = {node.name: _class(node, methods) for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes}
        functions = {node.name: _parameters(node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names}
        facts[file] = {"names": sorted(set(names) & _top_level(tree)), "functions": functions, "classes": found}
    return facts


def version_of(package: Path) -> str:
    """Of the package's metadata beside it, or of the source tree's PKG-INFO."""
    for pattern in (f"{package.name}*.dist-info/METADATA", "PKG-INFO"):
        for file in sorted(package.parent.glob(pattern)):
            if match := re.search(r"^Version: (\d+\.\d+(?:\.\d+)?)", file.read_text(), re.M):
                return match[1]
    raise SystemExit(f"no version of {package.name} beside {package}")


def record_or_compare(package: Path, facts: dict[str, Any], releases: Path) -> None:
    """Write the facts to the file that is the script's second argument; without one, compare them with those in `releases`."""
    version = version_of(package)
    described = {"version": version, "facts": facts}
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
        return
    recorded = releases / f"{version}.json"
    if not recorded.exists():
        raise SystemExit(f"{package.name} {version} is none of {[file.stem for file in sorted(releases.glob('*.json'))]}")
    if json.loads(recorded.read_text()) != described:
        raise SystemExit(f"{package.name} {version} here is not what was recorded")
    print(f"{package.name} {version}: as recorded")


def _top_level(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _class(node: ast.ClassDef, wanted: Collection[str]) -> dict[str, Any]:
    methods = {item.name: _parameters(item) for item in node.body if isinstance(item, ast.FunctionDef) and not _is_overload(item)}
    fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
    assigned = [item for item in node.body if isinstance(item, ast.Assign)]
    names = {target.id for item in assigned for target in item.targets if isinstance(target, ast.Name)}
    values = {
        target.id: item.value.value
        for item in assigned
        if isinstance(item.value, ast.Constant)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": {name: parameters for name, parameters in methods.items() if name in wanted},
        "attributes": sorted(fields | names | set(methods) | assigned_to_self(node) | _registered(node, "register_buffer")),
        "parameters": sorted(_registered(node, "register_parameter")),
        "values": {name: value for name, value in values.items() if isinstance(value, str)},
    }


def assigned_to_self(node: ast.AST, before: int | None = None) -> set[str]:
    """Attributes that code assigns to self, above line `before` if that is given."""
    stores = (item for item in ast.walk(node) if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store))
    return {item.attr for item in stores if isinstance(item.value, ast.Name) and item.value.id == "self" and (before is None or item.lineno < before)}


def calls_of(node: ast.AST, method: str) -> list[ast.Call]:
    """Calls of something's `method`."""
    calls = (item for item in ast.walk(node) if isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute))
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == method]


def _registered(node: ast.ClassDef, how: str) -> set[str]:
    """Names that are given to register_parameter or register_buffer as they stand."""
    return {call.args[0].value for call in calls_of(node, how) if call.args and isinstance(call.args[0], ast.Constant)}


def _is_overload(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in function.decorator_list)


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    star = [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    stars = [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)] + star + [a.arg for a in arguments.kwonlyargs] + stars
