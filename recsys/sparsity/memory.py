"""Memory by its address, for compiled loops: to ask for it ahead of its turn, and to read arrays of unequal shape."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FLOAT = np.uint64(4)
"""Bytes of a weight."""
_LINE = np.uint64(64)
"""Bytes of a line of the cache."""


@intrinsic
def _prefetch(_: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, number(0), number(3), number(1)])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(types.uint64), code


def _read(kind: Any, found: Any) -> Any:
    @intrinsic
    def read(_: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()))

        return found(types.uint64), code

    return read


float_at, byte_at = _read(ir.FloatType(), types.float32), _read(ir.IntType(8), types.uint8)


@njit(cache=True, nogil=True)
def ask(address, size):
    """Have `size` bytes come to the cache. Nothing is read: an address that is nobody's does no harm."""
    for byte in range(np.uint64(0), np.uint64(size), _LINE):
        _prefetch(address + byte)  # pyright: ignore[reportCallIssue]
