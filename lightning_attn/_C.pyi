"""The C++ extension; csrc/bindings.cpp says what the tuples hold."""

from enum import Enum
from typing import TypeAlias

class DType(Enum):
    float64 = ...
    float32 = ...
    bfloat16 = ...
    float16 = ...

_Operand: TypeAlias = tuple[int, int, int, int]
_State: TypeAlias = tuple[int, int, int] | None

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def advise_huge_pages(data: int, bytes: int) -> None: ...
def attention_forward(
    shape: tuple, q: _Operand, k: _Operand, v: _Operand, o: _Operand, initial: _State, final: _State
) -> None: ...
def attention_backward(
    shape: tuple,
    q: _Operand,
    k: _Operand,
    v: _Operand,
    grad_o: _Operand,
    initial: _State,
    grad_final: _State,
    grad_q: _Operand,
    grad_k: _Operand,
    grad_v: _Operand,
    grad_initial: _State,
) -> None: ...
def attention_decode(
    shape: tuple,
    q: _Operand,
    k: _Operand,
    v: _Operand,
    o: _Operand,
    state_dtype: DType,
    state: _State,
    state_rows: int,
    slots: int,
) -> None: ...
def gated_rms_norm_forward(sizes: tuple, x: int, gate: int, weight: int, y: int, rstd: int) -> None: ...
def gated_rms_norm_backward(
    sizes: tuple,
    grad_y: int,
    grad_y_stride: int,
    x: int,
    gate: int,
    weight: int,
    rstd: int,
    grad_x: int,
    grad_gate: int,
    grad_weight: int,
) -> None: ...
def can_emulate_cuda() -> bool: ...
def emulate_cuda(name: str, blocks: int, shared: int, parameters: bytes) -> None: ...
