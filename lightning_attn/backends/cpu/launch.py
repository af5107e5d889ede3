"""What the callers of the C++ kernels share."""

import torch

from . import _C  # the package has imported it by now

DTYPES = {
    torch.float64: _C.DType.float64,
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
}
