"""Triton's interpreter without what it does anew for each operation, most of a kernel's time.

For each operation it makes the types of blocks and the shapes of tensors, finds what two types
become together, and computes whether an integer overflowed, for a check that is off. For each
launch it looks through the whole language for what is to be replaced. Types never change, so what
follows from them is kept, and the language is patched once. What is computed is the same.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

PLAIN = frozenset({int, float, bool, str, type(None)})
INTEGERS = frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
FLOATS = frozenset(core.dtype.FP_TYPES)
ITSELF = INTEGERS | {"fp32", "fp64"}  # two of such a type stay of that type, divided too
KEPT_NUMEL, KEPT_CONSTANTS = 1024, 4096  # 32 MiB at most


def install() -> None:
    """For this process, once. Nothing for a Triton other than the one whose parts these are."""
    if not triton.__version__.startswith("3.6."):
        return
    core._unwrap_if_constexpr = _quick_unwrap(core._unwrap_if_constexpr)
    _install_types()
    _install_operations()
    _install_launch()


def _quick_unwrap(unwrap: Any) -> Any:
    def quick(value: Any) -> Any:
        if type(value) in PLAIN:
            return value
        return value.value if type(value) is core.constexpr else unwrap(value)

    return quick


# Types: one object for each type of block, with its sizes as plain integers.


def _install_types() -> None:
    dtype: Any = core.dtype
    pointer_type: Any = core.pointer_type
    block_type: Any = core.block_type
    dtype.is_int = lambda self: self.name in INTEGERS
    dtype.is_floating = lambda self: self.name in FLOATS
    for kind in (dtype, pointer_type):
        kind.__eq__ = _same_or(kind.__eq__)
    dtype.sizes, dtype.of_tensor = (), _shape_of_tensor(())
    pointer_type.itemsize = 8
    block_type.__new__ = _kept_block_type(block_type.__init__)
    block_type.__init__ = lambda self, *_: None
    block_type.with_element_ty = lambda self, type: block_type(type, self.sizes)
    core.tensor.__init__ = _tensor_of_kept_shape


def _same_or(equal: Any) -> Any:
    return lambda self, other: self is other or equal(self, other)


def _kept_block_type(init: Any) -> Any:
    kept: dict[tuple, Any] = {}

    def new(cls: type, element_ty: core.dtype, shape: Any) -> Any:
        element = (element_ty.name, getattr(element_ty, "address_space", 0))
        key = (*element, *shape)
        if key not in kept:
            made: Any = object.__new__(cls)
            init(made, element_ty, list(shape))
            made.sizes = tuple(made.shape)
            made.of_tensor = _shape_of_tensor(made.sizes)
            kept[key] = kept.setdefault((*element, *made.sizes), made)
        return kept[key]

    return new


def _shape_of_tensor(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """(shape, numel) as a tensor of that block type has them."""
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))


def _tensor_of_kept_shape(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor


# Operations: what the types of their operands become, and numbers as blocks.


def _install_operations() -> None:
    semantic: Any = TritonSemantic
    semantic.computation_type_impl = _kept_computation_type(semantic.computation_type_impl)
    semantic.broadcast_impl_value = _quick_broadcast(semantic.broadcast_impl_value)
    semantic.cast = _quick_cast(semantic.cast)
    semantic.to_tensor = _quick_to_tensor(semantic.to_tensor)
    semantic.expand_dims = _quick_expand_dims(semantic.expand_dims)
    semantic.binary_op_type_checking_impl = _quick_operands(semantic.binary_op_type_checking_impl)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    interpreter.TensorHandle.__init__ = _make_handle
    interpreter.InterpreterBuilder.binary_op = _binary_op
    # An overflow would be told by `device_assert`, which does nothing without options.debug.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def _by_name(function: Any) -> Any:
    kept: dict[str, Any] = {}

    def quick(dtype: Any) -> Any:
        if dtype.name not in kept:
            kept[dtype.name] = function(dtype)
        return kept[dtype.name]

    return quick


def _make_handle(self: Any, data: Any, dtype: Any, attr: dict | None = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if data.itemsize > (dtype.itemsize or 1):
        self.__post_init__()  # raises


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    output = op(lhs.data, rhs.data)
    dtype = lhs.dtype.scalar
    if output.itemsize > (dtype.itemsize or 1):
        output = output.astype(interpreter._get_np_dtype(dtype))
    return interpreter.TensorHandle(output, dtype)


def _kept_computation_type(function: Any) -> Any:
    kept: dict[tuple, Any] = {}

    def quick(self: Any, a: Any, a_scalar: bool, b: Any, b_scalar: bool, div_or_mod: bool) -> Any:
        key = (a.name, a_scalar, b.name, b_scalar, div_or_mod)
        if key not in kept:
            kept[key] = function(self, a, a_scalar, b, b_scalar, div_or_mod)
        return kept[key]

    return quick


def _quick_cast(cast: Any) -> Any:
    def quick(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        if input.dtype is dst_ty.scalar:
            return input
        return cast(self, input, dst_ty, fp_downcast_rounding)

    return quick


def _quick_to_tensor(to_tensor: Any) -> Any:
    kept: dict[tuple, Any] = {}

    def quick(self: Any, x: Any, check_type: bool = True) -> Any:
        if type(x) is core.tensor:
            return x
        if type(x) not in (bool, int, float) or x != x:
            return to_tensor(self, x, check_type)
        key = (type(x), x)
        if key not in kept:
            if len(kept) >= KEPT_CONSTANTS:
                return to_tensor(self, x, check_type)
            kept[key] = to_tensor(self, x, check_type)
        return kept[key]

    return quick


def _quick_expand_dims(expand_dims: Any) -> Any:
    def quick(self: Any, input: Any, axis: int) -> Any:
        sizes = input.type.sizes
        if not sizes or axis < 0:
            return expand_dims(self, input, axis)
        data = input.handle.data[(slice(None),) * axis + (None,)]
        handle = interpreter.TensorHandle(data, input.dtype)
        shape: Any = (*sizes[:axis], 1, *sizes[axis:])
        return self.tensor(handle, core.block_type(input.dtype, shape))

    return quick


def _quick_broadcast(broadcast: Any) -> Any:
    def quick(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type.sizes, rhs.type.sizes
        if a == b:
            return lhs, rhs
        if not a:
            return filled(self, lhs, b), rhs
        if not b:
            return lhs, filled(self, rhs, a)
        if len(a) == len(b) and all(x == y or x == 1 or y == 1 for x, y in zip(a, b, strict=True)):
            sizes = tuple(map(max, a, b))
            return stretched(self, lhs, sizes), stretched(self, rhs, sizes)
        return broadcast(self, lhs, rhs)

    def filled(self: Any, x: Any, sizes: Any) -> Any:
        dtype = x.dtype
        data = np.empty(sizes, interpreter._get_np_dtype(dtype))
        data[...] = x.handle.data
        return self.tensor(interpreter.TensorHandle(data, dtype), core.block_type(dtype, sizes))

    def stretched(self: Any, x: Any, sizes: Any) -> Any:
        if x.type.sizes == sizes:
            return x
        data = x.handle.data
        if data.flags.c_contiguous:
            steps = zip(data.strides, data.shape, strict=True)
            strides = tuple(0 if size == 1 else step for step, size in steps)
            data = np.ndarray(sizes, data.dtype, data, 0, strides)
        else:
            data = np.broadcast_to(data, sizes)
        handle = interpreter.TensorHandle(data, x.dtype)
        return self.tensor(handle, core.block_type(x.dtype, sizes))

    return quick


def _quick_operands(check: Any) -> Any:
    kept: dict[tuple, Any] = {}

    def number(self: Any, x: Any, y: Any, left: bool, *rest: bool) -> Any:
        """A tensor and a number on its left or right."""
        key = (x.dtype.name, x.type.sizes, type(y), y, *rest)
        if key in kept:
            return (kept[key], x) if left else (x, kept[key])
        pair = check(self, y, x, *rest) if left else check(self, x, y, *rest)
        constant, tensor = pair if left else pair[::-1]
        small = constant.numel.value <= KEPT_NUMEL and len(kept) < KEPT_CONSTANTS
        if tensor is x and y == y and small:
            kept[key] = constant
        return pair

    def quick(self: Any, lhs: Any, rhs: Any, *rest: bool) -> Any:
        if type(lhs) is core.tensor and lhs.dtype.name in ITSELF:
            if type(rhs) is core.tensor:
                if lhs.dtype is rhs.dtype:
                    return self.broadcast_impl_value(lhs, rhs)
            elif type(rhs) in (int, float):
                return number(self, lhs, rhs, False, *rest)
        elif type(lhs) in (int, float) and type(rhs) is core.tensor and rhs.dtype.name in ITSELF:
            return number(self, rhs, lhs, True, *rest)
        elif type(lhs) is type(rhs) is core.tensor and is_offset(lhs, rhs, *rest):
            return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, *rest)

    def is_offset(lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, *_: bool) -> bool:
        return allow_lhs_ptr and lhs.dtype.is_ptr() and rhs.dtype.name in INTEGERS

    return quick


# Launches: the language patched once, and memory of the host taken as it is.


def _install_launch() -> None:
    interpreter._patch_attr = _patch_attr
    language: Any = SimpleNamespace(__globals__={"tl": tl, "core": core})
    interpreter._patch_lang(language)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    interpreter.InterpretedFunction.__call__ = _call
    executor: Any = interpreter.GridExecutor
    executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda *_: None


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Without the wrapper that asks for `_semantic`, which is given here."""
    semantic = TritonSemantic(builder)
    wrapped = member.__code__ is core.to_tensor.__code__
    function = member.__wrapped__ if wrapped else member

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, _semantic=semantic, **kwargs)

    scope.set_attr(obj, name, call)


def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
