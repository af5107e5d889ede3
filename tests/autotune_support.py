"""What the tests of tuning share: the kernels that are tuned, as configured on the machine's architecture.

To be imported only where Triton runs.
"""

import torch
from support import device_of

from lightning_attn.backends.triton import config
from lightning_attn.backends.triton.autotune import Kernel
from lightning_attn.backends.triton.config import Tiles

DEVICE = torch.device(device_of("triton"))
ARCH = config.device_arch(DEVICE)
KERNELS = [config.chunk, config.chunk_state, config.chunk_backward, config.chunk_backward_split]


def configurations(*dtypes: torch.dtype, K: int = 16, V: int = 16) -> list[Kernel]:
    """Those that the machine's architecture has."""
    found = [Kernel(configured, K, V, dtype, ARCH) for configured in KERNELS for dtype in dtypes]
    return [kernel for kernel in found if configured_tiles(kernel)]


def configured_tiles(kernel: Kernel) -> Tiles | None:
    try:
        return kernel.configured(kernel.K, kernel.V, kernel.dtype, kernel.arch)
    except AssertionError:  # where a whole state fits nothing is split
        return None


CHUNK = configurations(torch.float32)[0]
