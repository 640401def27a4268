"""The compiled side, opened by `ctypes`: it needs neither Python's headers nor PyTorch's."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

from polyformer.errors import RunError

log = logging.getLogger("polyformer.native")

P, N, C, D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
TEXT = ctypes.c_char_p

FACE: dict[str, tuple[Any, list[Any]]] = {
    "pf_model_new": (C, [P, N, P, TEXT]),
    "pf_model_give": (C, [P, N, C, C, P, N, N, N, P, TEXT]),
    "pf_model_free": (None, [P]),
    "pf_state_new": (C, [P, N, N, C, C, C, P, TEXT]),
    "pf_state_free": (None, [P]),
    "pf_state_kernels": (TEXT, [P]),
    "pf_state_bytes": (N, [P]),
    "pf_state_bytes_for": (N, [P, N, N]),
    "pf_step": (C, [P, N, P, P, P, N, P, P, TEXT]),
    "pf_best": (C, [P, N, P, P, P, N, P, N, N, P, P, P, TEXT]),
    "pf_read": (C, [P, N, P, P, TEXT]),
    "pf_truncate": (C, [P, N, N, TEXT]),
    "pf_clear": (C, [P, N, TEXT]),
    "pf_copy": (C, [P, N, N, N, TEXT]),
    "pf_length": (C, [P, N, P, TEXT]),
    "pf_earliest": (C, [P, N, P, TEXT]),
    "pf_sum": (D, [P, N, C]),
}
"""What each function returns and takes."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Open the compiled library; None, said once, where the package was installed without a compiler."""
    found = sorted(Path(__file__).parent.glob("_native*.so")) + sorted(Path(__file__).parent.glob("_native*.pyd"))
    if not found:
        log.warning("the native runtime was not compiled when polyformer was installed; models run in PyTorch")
        return None
    opened = ctypes.CDLL(str(found[0]))
    for name, (result, arguments) in FACE.items():
        function = getattr(opened, name)
        function.restype, function.argtypes = result, arguments
    return opened


def required() -> ctypes.CDLL:
    """Open the compiled library; raises `RunError` where there is none."""
    found = library()
    if found is None:
        raise RunError("the native runtime is not compiled; install polyformer where there is a C++17 compiler")
    return found


def call(name: str, *arguments: Any) -> None:
    """Call a function that may refuse; raises `RunError` with what it says."""
    error = ctypes.create_string_buffer(256)
    if getattr(required(), name)(*arguments, error):
        raise RunError(error.value.decode("utf-8", "replace"))
