"""Run the kernels themselves on a CPU, in Triton's interpreter, without TRITON_INTERPRET in the environment.

Under that variable `triton.jit` yields another kind of function for the whole process, and fake tensors,
`torch.compile` and offline compilation stop working. Here jitted functions are interpreted inside one block only:

    with interpreted():
        out = attention(qkv, cu_seqlens, max_seqlen)  # CPU tensors

The interpreter multiplies bf16 wrongly, so kernels get UPCAST_DOT there, and rounds to 8-bit floats wrongly, so torch
does that. `blocks` overrides the configuration that is chosen for a launch.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.experimental.gluon.language  # noqa: F401  must be imported before jitted functions are replaced
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from ds_stacking.kernels._launch import Executor, Launch, executing


class _Helper(InterpretedFunction):
    """A jitted function that a kernel calls. Triton's own class patches the language at every call, which is slow,
    and never takes that back, after which nothing compiles any more; here each launch does both once."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


class _Interpret(Executor):
    """Executes launches in the interpreter, in the configurations of the target tuned for."""

    everywhere = one_by_one = True

    def __init__(self, blocks: dict[str, Any]) -> None:
        self.blocks = blocks

    def target(self, launch: Launch) -> str:
        return "sm_90"

    def run(self, launch: Launch, config: triton.Config) -> None:
        meta = {**config.kwargs, **launch.constexprs}
        meta |= {name: value for name, value in self.blocks.items() if name in meta}
        if "UPCAST_DOT" in meta:
            meta["UPCAST_DOT"] = True
        library = interpreter._patch_lang(tl.standard.sum.fn)  # for what Triton's own jitted functions call
        try:
            InterpretedFunction(launch.kernel.fn.fn)[launch.grid](*launch.args, **meta)
        finally:
            library.restore()


@contextlib.contextmanager
def interpreted(**blocks: Any) -> Iterator[None]:
    """Run every kernel launched inside the block in the interpreter; `blocks` replaces meta-parameters by name."""
    modules = [module for name, module in sys.modules.items() if name.startswith(__package__ + ".")]
    modules += [tl, tl.standard, tl.math, tl.random]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    stack.callback(setattr, module, name, value)
                    setattr(module, name, _Helper(value.fn))
        stack.enter_context(_numpy_scalars())
        stack.enter_context(_fp8_rounding())
        stack.enter_context(executing(_Interpret(blocks)))
        yield


@contextlib.contextmanager
def _fp8_rounding() -> Iterator[None]:
    """Triton 3.9's interpreter loses the carry of a mantissa that rounds up to 2, and rounds ties away from 0."""
    original = interpreter._convert_float
    formats = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in formats:
            return original(x, source, target, rounding)
        values = torch.from_numpy(x.view("float32").copy())
        return values.to(formats[target]).view(torch.uint8).numpy()

    interpreter._convert_float = convert
    try:
        yield
    finally:
        interpreter._convert_float = original


@contextlib.contextmanager
def _numpy_scalars() -> Iterator[None]:
    """Triton 3.6's interpreter turns run-time loop bounds into int() of 1-d arrays, which NumPy 2.4 refuses."""
    if "squeeze" in inspect.getsource(interpreter._patch_lang_tensor):  # mended in later versions
        yield
        return
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, _Scope(scope))

    interpreter._patch_lang_tensor = patched
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = original


class _Scope:
    """Triton's patch scope with `__index__` replaced on its way."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def set_attr(self, owner: Any, name: str, value: Any) -> None:
        if name == "__index__":
            value = _index
        self.scope.set_attr(owner, name, value)


def _index(tensor: Any) -> int:
    return int(tensor.handle.data.item())
