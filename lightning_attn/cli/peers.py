"""Who else does the same: the providers that `bench --compare` puts beside ours."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass, fields
from types import ModuleType

import torch
from torch import Tensor

from . import moe_peers
from .case import LAYERS, Case
from .cases import Attention, Decode, Layer, as_function
from .eager import Function
from .softmax import Softmax, sdpa

OURS, EAGER, TRANSFORMERS = "lightning_attn", "eager-256", moe_peers.TRANSFORMERS
FLA, FLA_LIGHTNING = "fla", "fla-lightning"  # flash-linear-attention: chunk_simple_gla, chunk_lightning_attn
SDPA = "sdpa"  # a yardstick: it computes something else
TRANSFORMERS_MODULE = "transformers.models.minimax.modeling_minimax"
FLA_MODULES = ("fla.ops.simple_gla", "fla.ops.lightning_attn")

GPU_PEERS = ("cuda",)  # devices of those whose kernels are made for GPUs
SDPA_DTYPES = (torch.bfloat16, torch.float16)  # of FlashAttention


@dataclass(frozen=True)
class Peer:
    """A version of a case's op, and the case whose truth it is judged by: another one if it computes another op."""

    function: Function
    case: Case


def peers(case: Case, device: torch.device) -> dict[str, Peer]:
    """By name, the other versions of a case's op that are installed and run on the device."""
    found = {moe_peers.plain_name(case) or EAGER: Peer(case.plain, case)}
    on_gpu = device.type in GPU_PEERS
    modeling = importlib.import_module(TRANSFORMERS_MODULE) if _transformers_missing() is None else None
    found |= {name: Peer(f, case) for name, f in moe_peers.versions(case, on_gpu, modeling).items()}
    if isinstance(case, Layer) and modeling:
        found[TRANSFORMERS] = Peer(_transformers_layer(case), case)
    if on_gpu and isinstance(case, Attention | Decode) and not isinstance(_fla(), str):
        found |= {name: Peer(function, case) for name, function in _fla_versions(case)}
    if on_gpu and isinstance(case, Attention) and _has_softmax(case):
        same = {f.name: getattr(case, f.name) for f in fields(case)}
        found[SDPA] = Peer(sdpa, Softmax(**same))
    return found


def missing_peers(device: torch.device) -> list[str]:
    """Peers for this device that are not there, and why."""
    on_gpu = device.type in GPU_PEERS
    fla = _fla() if on_gpu else None
    reasons = (_transformers_missing(), fla if isinstance(fla, str) else None, *moe_peers.missing(on_gpu))
    return [reason for reason in reasons if reason]


def _transformers_missing() -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: its layers are not compared"
    try:
        importlib.import_module(TRANSFORMERS_MODULE)
    except Exception as error:  # noqa: BLE001 - a peer that is broken is not there
        return f"transformers' MiniMax layers are not compared: {type(error).__name__}: {error}"
    return None


def _transformers_layer(case: Layer) -> Function:
    """transformers' MiniMax layer; at layer 0 its slopes are ours."""
    modeling = importlib.import_module(TRANSFORMERS_MODULE)
    config = modeling.MiniMaxConfig(
        hidden_size=case.hidden,
        num_attention_heads=case.H,
        num_key_value_heads=case.H,
        head_dim=case.D,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * LAYERS,
    )

    def module(device: torch.device) -> torch.nn.Module:
        return modeling.MiniMaxLightningAttention(config, layer_idx=0).to(device, case.dtype)

    return as_function(module, position_embeddings=None, attention_mask=None)


@functools.cache  # an import that fails takes its time again
def _fla() -> tuple[ModuleType, ...] | str:
    """flash-linear-attention's modules, or why they are not there."""
    try:
        return tuple(map(importlib.import_module, FLA_MODULES))
    except Exception as error:  # noqa: BLE001 - a peer that is broken is not there
        if isinstance(error, ModuleNotFoundError) and error.name == "fla":
            return "flash-linear-attention is not installed: it is not compared"
        return f"flash-linear-attention is not compared: {type(error).__name__}: {error}"


def _fla_versions(case: Attention | Decode) -> list[tuple[str, Function]]:
    modules = _fla()
    assert not isinstance(modules, str)
    simple_gla, lightning = modules
    if isinstance(case, Decode):  # it knows no slots
        return [] if case.slots else [(FLA, _fla_decode(simple_gla.fused_recurrent_simple_gla))]
    versions = [(FLA, _fla_attention(simple_gla.chunk_simple_gla, case.stateful))]
    if case.slopes == "fla":  # it computes them itself, as decay.fla does
        op = functools.partial(lightning.chunk_lightning_attn, layer_idx=0, num_layers=LAYERS)
        versions.append((FLA_LIGHTNING, _fla_attention(op, case.stateful, rates=False)))
    return versions


def _fla_attention(op: Function, stateful: bool, rates: bool = True) -> Function:
    """Its layout is ours, its decay the logarithm of what a token keeps; it gives a state in float32 if asked."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        gamma = {"g_gamma": _negative(decay)} if rates else {}
        return op(
            q,
            k,
            v,
            scale=scale,
            initial_state=initial_state,
            output_final_state=stateful,
            cu_seqlens=cu_seqlens,
            **gamma,
        )

    return attention


def _fla_decode(op: Function) -> Function:
    """It gives a new state, which takes the place of the old one without a copy, as in its own cache. In a graph, whose
    replays read the same memory, and in another dtype there is one.
    """

    def decode(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        state: Tensor,
        *,
        slots: Tensor | None = None,
        scale: float,
    ) -> Tensor:
        assert slots is None
        gamma = _negative(decay)
        o, new = op(q, k, v, g_gamma=gamma, scale=scale, initial_state=state, output_final_state=True)
        if new.dtype != state.dtype or (state.is_cuda and torch.cuda.is_current_stream_capturing()):
            state.copy_(new)
        else:
            state.set_(new)
        return o

    return decode


@functools.lru_cache(maxsize=4)
def _negative(decay: Tensor) -> Tensor:
    """Once for each tensor, as a model would have it: it is no part of a call."""
    return -decay


def _has_softmax(case: Attention) -> bool:
    """FlashAttention takes the shape and the dtype, and softmax attention knows no state."""
    return case.dtype in SDPA_DTYPES and case.K == case.V and not case.lengths and not case.stateful
