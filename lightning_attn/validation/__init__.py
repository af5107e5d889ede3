"""Every input error, in the form "function: expected ..., got ...".

The public functions check the structure of their arguments: types, dtypes, shapes, devices and strides. The
functions named `*_values` read tensors; operators call them, so that they also hold under torch.compile.
"""

from .attention import attention, attention_values, decode, decode_values, layer
from .common import types
from .norm import gated_rms_norm

__all__ = ["attention", "attention_values", "decode", "decode_values", "gated_rms_norm", "layer", "types"]
