"""What the callers of the C++ kernels share."""

import torch
from torch import Tensor

from . import _C  # the package has imported it by now

_HUGE_BYTES = 1 << 22  # as NumPy does

DTYPES = {
    torch.float64: _C.DType.float64,
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
}


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous memory for an output, on huge pages where that pays."""
    out = like.new_empty(shape, dtype=dtype)
    if out.nbytes >= _HUGE_BYTES:
        _C.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
