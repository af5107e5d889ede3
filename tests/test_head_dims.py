"""Head dims from 1 to 256, of the attention and its gradients and of decode."""

import pytest
import torch
from decode_support import check_decode
from support import HALF, affordable, check, dtype_id, make_inputs, run

from lightning_attn.dispatch import accumulation_dtype

HEAD_DIMS = [
    (1, 1), (1, 48), (48, 1), (2, 3), (16, 16), (15, 33), (31, 17), (64, 64), (65, 48), (80, 96), (127, 63),
    (128, 128), (131, 160), (256, 256),
]  # fmt: skip
DTYPES_AND_HEAD_DIMS = [
    *((dtype, K, V) for dtype in (torch.float32, torch.bfloat16) for K, V in HEAD_DIMS),
    *((dtype, K, V) for dtype in (torch.float64, torch.float16) for K, V in HEAD_DIMS[1:14:3]),
    *((dtype, K, V) for dtype in HALF for K, V in ((1, 256), (256, 1))),
]


@pytest.mark.parametrize(("dtype", "K", "V"), DTYPES_AND_HEAD_DIMS, ids=dtype_id)
def test_head_dims_from_1_to_256_and_k_unlike_v(variant, dtype, K, V):
    """Rows 1 and 12: any head dimensions, odd ones and K != V among them."""
    B = 2 if K * V > 2**14 else max(4, 64 // min(K, V))  # enough numbers for errors to compare
    B = affordable(variant, B, min(B, 8))
    x = make_inputs(B=B, T=70, H=3, K=K, V=V, dtype=dtype, scale=K**-0.5)
    check(run(x, variant), x)


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize(("dtype", "K", "V"), DTYPES_AND_HEAD_DIMS, ids=dtype_id)
def test_decode_takes_head_dims_from_1_to_256_and_k_unlike_v(variant, dtype, K, V):
    """Rows 1 and 12: any head dimensions."""
    B = 16 if K * V > 2**14 else max(64, 512 // min(K, V))
    B = affordable(variant, B, 16)
    x = make_inputs(B=B, T=1, H=2, K=K, V=V, dtype=dtype)
    check_decode(x, variant, accumulation_dtype(dtype))
