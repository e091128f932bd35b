"""Repairs Triton 3.6's interpreter for NumPy 2.4, where an array of one value is no integer any more."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_original = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def repair() -> None:
    interpreter._patch_lang_tensor = _patch_lang_tensor
