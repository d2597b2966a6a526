"""Processes that start in no time: forked from a server that has imported torch and halfbyte once, and not Triton.

Triton decides when it is imported whether kernels are interpreted, so interpreted kernels need such a process.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import pytest
import torch

TIMEOUT_S = 1800  # many times what the slowest takes alone: it ends what hangs, not what shares two cores with others
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torch.distributed", "halfbyte", "halfbyte.moe.parallel", "pytest"])


def begin(*, interpreted: bool) -> None:
    """What such a process does first: the helpers of the tests can be imported, one thread computes, kernels are interpreted or not."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    if interpreted:
        assert "triton" not in sys.modules, "Triton decides when it is imported"
        os.environ["TRITON_INTERPRET"] = "1"
        _hasten_interpreter()


def _hasten_interpreter() -> None:
    """Leave out what takes two thirds of the time in Triton's interpreter (3.6 to 3.9) and computes nothing.

    Where one function calls another it searches its language for functions to replace, although the launch has replaced them; only names of another
    module of the language (the `tl.core` of its own library) still need that, once. Every sum of integers is followed by a check for overflow, which
    compiled kernels do not have. What is known of a type (its shape, its size, its dtype in numpy) is found out anew for every value. Values of one
    shape are broadcast, and those of one dtype are promoted to it; a constant beside them is filled in anew. Every array is compared with the
    size of its type.
    """
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    searched: set[int] = set()

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        names = id(function.fn.__globals__)
        if names not in searched:
            interpreter._patch_lang(function.fn)
            searched.add(names)
        return function.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

    dtype_of, of_block, of_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    broadcast_any = TritonSemantic.broadcast_impl_value
    dtypes, blocks, tensors = {}, {}, {}  # by the name of the type; attributes that all such objects have

    def np_dtype(type: Any) -> Any:
        if type.name not in dtypes:
            dtypes[type.name] = dtype_of(type)
        return dtypes[type.name]

    def init_block(block: Any, element: Any, shape: Any) -> None:
        key = (element.name, *[getattr(size, "value", size) for size in shape])
        if key not in blocks:
            of_block(block, element, shape)
            blocks[key] = vars(block)
        vars(block).update(blocks[key])

    def init_tensor(tensor: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            of_tensor(tensor, None, type)
            tensors[type.name] = {name: value for name, value in vars(tensor).items() if name != "handle"}
        vars(tensor).update(tensors[type.name], handle=handle)

    def broadcast(semantic: Any, left: Any, right: Any) -> Any:
        alike = left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values
        return (left, right) if alike else broadcast_any(semantic, left, right)

    promoted_any = TritonSemantic.binary_op_type_checking_impl
    promoted_to_themselves = {"fp32", "int32", "uint32", "int64"}
    constants = {}  # of the shape and dtype of what they stand beside

    def promote(semantic: Any, left: Any, right: Any, *options: Any, **more: Any) -> Any:
        if not isinstance(left, core.tensor):
            return promoted_any(semantic, left, right, *options, **more)
        if isinstance(right, core.tensor):
            if left.dtype.name == right.dtype.name in promoted_to_themselves:
                return semantic.broadcast_impl_value(left, right)
            return promoted_any(semantic, left, right, *options, **more)
        key = (left.type.name, repr(right), options, *more.items())
        if key in constants:
            return left, constants[key]
        promoted, constant = promoted_any(semantic, left, right, *options, **more)
        if promoted is left:
            constant.handle.data.setflags(write=False)
            constants[key] = constant
        return promoted, constant

    unwrap_any, patch_any = core._unwrap_if_constexpr, interpreter._patch_attr
    unwrapped = {core.tensor, core.dtype, core.block_type, core.pointer_type, int, float, bool, str, type(None)}

    def unwrap(value: Any) -> Any:
        return value if type(value) in unwrapped else value.value if type(value) is core.constexpr else unwrap_any(value)

    def patch(owner: Any, name: str, member: Any, *scope: Any) -> None:
        patch_any(owner, name, getattr(member, "__wrapped__", member), *scope)  # around some is a check that there is an interpreter

    interpreter._patch_attr = patch
    core._unwrap_if_constexpr = unwrap
    interpreter.TensorHandle.__post_init__ = lambda handle: None

    interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = np_dtype, init_block, init_tensor
    TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_type_checking_impl = broadcast, promote


def interpret(run: Callable[[str], None], file: str) -> str:
    """What run(file) prints where kernels are interpreted. It may not fail."""
    with tempfile.NamedTemporaryFile("r") as output:
        process = context.Process(target=_interpret, args=(run, file, output.name))
        process.start()
        process.join(TIMEOUT_S)
        process.kill()
        process.join()
        printed = output.read()
    assert process.exitcode == 0, printed[-7000:]
    return printed


def _interpret(run: Callable[[str], None], file: str, output: str) -> None:
    with Path(output).open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    begin(interpreted=True)
    run(file)


def run_tests(file: str) -> None:
    """The tests marked "gpu" of a file."""
    for name in [name for name in os.environ if name.startswith("PYTEST")]:
        del os.environ[name]  # settings of the pytest that runs this one
    without = [argument for plugin in ("cacheprovider", "xdist", "hypothesispytest") for argument in ("-p", f"no:{plugin}")]
    sys.exit(pytest.main(["-q", "-m", "gpu", *without, file]))


def run_script(file: str) -> None:
    runpy.run_path(file, run_name="__main__")


def cache_keys(kernels: list[str]) -> dict[str, str]:
    """Of each kernel of halfbyte, in a process that asks for them in this order."""
    begin(interpreted=False)
    assert "triton" not in sys.modules, "what is imported before them has a part in the keys"
    places = [name.rpartition(".") for name in kernels]
    return {name: getattr(importlib.import_module(f"halfbyte.{module}"), name).cache_key for module, _, name in places}


class Module:
    """What `subprocess.Popen([sys.executable, "-m", module, *arguments], ...)` gives, without the seconds that importing torch takes."""

    def __init__(self, command: list[str], *, stdout: int, stderr: IO[bytes], text: bool, env: dict[str, str], start_new_session: bool):
        assert command[:2] == [sys.executable, "-m"] and stdout == subprocess.PIPE and text and start_new_session
        receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_run_module, args=(command[2:], env, sender, stderr.name))
        self._process.start()
        sender.close()
        self.pid = self._process.pid
        self.stdout = os.fdopen(os.dup(receiver.fileno()))
        receiver.close()
        self.stdout.readline()  # now it has a session of its own

    def wait(self) -> None:
        self._process.join()
        self.stdout.close()


def _run_module(command: list[str], environment: dict[str, str], output: Connection, errors: str) -> None:
    os.setsid()
    os.write(output.fileno(), b"\n")
    with Path(errors).open("ab") as stream:
        for descriptor, target in ((1, output), (2, stream)):
            os.dup2(target.fileno(), descriptor)
    output.close()
    begin(interpreted=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv, sys.orig_argv = command, [sys.executable, "-m", *command]
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ImportError):  # which a new Python imports
        importlib.import_module("sitecustomize")
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
