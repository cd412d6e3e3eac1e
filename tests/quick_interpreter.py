"""Triton's interpreter without what it does anew for each operation, half of a kernel's time.

It makes the type of a block, the shape of a tensor and a table of all types for each operation, and
looks through the whole language for what is to be replaced in each call of a kernel's function.
Types and shapes never change, so they are kept. What is computed is the same.
"""

from __future__ import annotations

import math
from typing import Any

import triton
from triton.language import core
from triton.runtime import interpreter

PLAIN = frozenset({int, float, bool, str, type(None)})


def install() -> None:
    """For this process, once. Nothing for a Triton other than the one whose parts these are."""
    if not triton.__version__.startswith("3.6."):
        return
    core._unwrap_if_constexpr = _quick_unwrap(core._unwrap_if_constexpr)
    core.block_type.__init__ = _kept_block_type(core.block_type.__init__)
    core.tensor.__init__ = _tensor_of_kept_shape
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    interpreter.InterpretedFunction.__call__ = _call_patched_once


def _quick_unwrap(unwrap: Any) -> Any:
    def quick(value: Any) -> Any:
        if type(value) in PLAIN:
            return value
        return value.value if type(value) is core.constexpr else unwrap(value)

    return quick


def _by_name(function: Any) -> Any:
    kept: dict[str, Any] = {}

    def quick(dtype: core.dtype) -> Any:
        if dtype.name not in kept:
            kept[dtype.name] = function(dtype)
        return kept[dtype.name]

    return quick


def _kept_block_type(init: Any) -> Any:
    kept: dict[tuple, dict[str, Any]] = {}

    def quick(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
        key = (element_ty.name, getattr(element_ty, "address_space", 0), *shape)
        parts = kept.get(key)
        if parts is None:
            init(self, element_ty, shape)
            self.of_tensor = _shape_of_tensor(self.shape)  # type: ignore
            kept[key] = dict(vars(self))
        else:
            vars(self).update(parts)

    return quick


def _shape_of_tensor(shape: Any) -> tuple[Any, Any]:
    """(shape, numel) as a tensor of that block type has them."""
    sizes = [core.constexpr(size) for size in shape]
    return core.tuple(sizes), core.constexpr(math.prod(shape))


_SCALAR = _shape_of_tensor(())


def _tensor_of_kept_shape(self: core.tensor, handle: Any, type: core.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else _SCALAR  # type: ignore


_patched: set[int] = set()  # modules


def _call_patched_once(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """What a kernel's own module calls is patched while the kernel runs. The language's own
    functions call another module, `core`, which has to be patched once, and stays so."""
    module = id(self.fn.__globals__)
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
