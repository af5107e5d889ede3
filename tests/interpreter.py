"""Triton's interpreter without what it does again and again to no effect, which is most of its time.

What a kernel computes, reads and writes stays the same.
"""

import dataclasses
from contextlib import suppress
from types import FunctionType

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _patch_once() -> None:
    """Each call of a function that a kernel calls looks through the whole language for what is still to be replaced,
    although its kernel's launch has replaced it.
    """
    patch = interpreter._patch_lang

    def patch_lang(fn: FunctionType) -> interpreter._LangPatchScope:
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()  # nothing to restore
        return patch(fn)

    interpreter._patch_lang = patch_lang


def _check_no_overflow_in_vain() -> None:
    """Sums and products of integers are computed in 64 bits too and compared; but unless it debugs, nobody looks at what
    comes out of it.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _keep_dtypes() -> None:
    """A table of NumPy's dtypes is made for every look into it."""
    get, found = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in found:
            found[name] = get(dtype)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype


def quicken() -> None:
    """In this process. A Triton whose interpreter is written otherwise is only slower."""
    for change in (_patch_once, _check_no_overflow_in_vain, _keep_dtypes):
        with suppress(AttributeError):
            change()
