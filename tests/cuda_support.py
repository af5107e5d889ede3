"""What the tests of csrc/cuda share."""

from pathlib import Path

import torch
from support import make_inputs

from lightning_attn.backends import cuda

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "csrc" / "cuda"


def decode_raw(B: int = 3, T: int = 1, state_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = make_inputs(B=B, T=T, H=5, K=128, V=70)
    return cuda.attention_decode(
        x.q, x.k, x.v, x.decay, x.initial_state.to(state_dtype), torch.tensor([2, -1, 0]), 0.5
    )
