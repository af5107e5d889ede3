"""What a config.json may hold: other names for our fields, what is of no matter, and what is not implemented."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

LIGHTNING, SOFTMAX = 0, 1  # the values in attn_type_list

# transformers' names -> the released ones
TRANSFORMERS = {
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}
LAYER_TYPES = {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}

# What says nothing about the network: where a config came from, and what a program does with its outputs.
_INERT = frozenset(
    [
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "auto_map",
        "block_size",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "num_labels",
    ]
)
# What the released network does not have: the only value that we can honour.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "router_jitter_noise": (0, None),
    "shared_intermediate_size": (0, None, [0]),
    "shared_moe_mode": ("sigmoid", None),
    "postnorm": (True,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
    "num_channels": (3,),
}
MODEL_TYPES = {
    "TextConfig": ("TextConfig", "minimax_text_01", "minimax", "MiniMaxText01"),
    "VisionConfig": ("VisionConfig", "clip_vision_model"),
    "VLConfig": ("VLConfig", "minimax_vl_01", "MiniMaxVL01"),
}
# CLIP's own: the projection and the vocabulary belong to its text half.
CLIP_INERT = frozenset(
    [
        "attention_dropout",
        "dropout",
        "initializer_factor",
        "initializer_range",
        "projection_dim",
        "vocab_size",
    ]
)
VL_INERT = frozenset(
    {"ignore_index", "image_seq_length", "process_image_mode", "img_token_compression_config"}
)
VL_ONLY: dict[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("default",),
}


def read_json(path: str | Path) -> dict[str, Any]:
    """The config.json at `path` or in the directory `path`."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"config: expected a config.json, got {file}, which is not there")
    try:
        fields = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: expected JSON in {file}, got {error}") from None
    expect(isinstance(fields, dict), f"a JSON object in {file}", type(fields).__name__)
    return fields


def lift_aliases(given: dict[str, Any]) -> None:
    for theirs, ours in TRANSFORMERS.items():
        if theirs in given:
            _put(given, ours, given.pop(theirs), theirs)
    if given.get("layer_types") is not None:
        expect(
            isinstance(given["layer_types"], (list, tuple)),
            "layer_types to be a list",
            repr(given["layer_types"]),
        )
        unknown = set(given["layer_types"]) - set(LAYER_TYPES)
        expect(not unknown, f"layer_types of {', '.join(LAYER_TYPES)}", sorted(map(str, unknown)))
        types = [LAYER_TYPES[name] for name in given["layer_types"]]
        _put(given, "attn_type_list", types, "layer_types")
    given.pop("layer_types", None)


def fill_heads(given: dict[str, Any]) -> None:
    """head_dim and num_key_value_heads where a config leaves them to the others."""
    hidden: Any = given.get("hidden_size")
    heads: Any = given.get("num_attention_heads")
    if given.get("head_dim", 1) is None:
        known = _count(hidden) and _count(heads)
        expect(known, "hidden_size and num_attention_heads for a head_dim", (hidden, heads))
        given["head_dim"] = hidden // heads
    if given.get("num_key_value_heads", 1) is None:
        given["num_key_value_heads"] = heads


def lift_rope(given: dict[str, Any]) -> None:
    """rope_parameters, and half of a head where nothing says how much RoPE turns."""
    rope = given.pop("rope_parameters", None) or {}
    expect(isinstance(rope, Mapping), "rope_parameters to be an object", repr(rope))
    rope = dict(rope)
    kind = rope.pop("rope_type", "default")
    expect(kind == "default", "rope_parameters of rope_type 'default'", kind)
    head_dim: Any = given.get("head_dim", 128)
    if "partial_rotary_factor" in rope:
        _put(given, "partial_rotary_factor", rope.pop("partial_rotary_factor"), "rope_parameters")
    factor = given.pop("partial_rotary_factor", None)
    if "rope_theta" in rope:
        _put(given, "rope_theta", rope.pop("rope_theta"), "rope_parameters")
    expect(not rope, "rope_parameters of rope_theta, rope_type and partial_rotary_factor", sorted(rope))
    if factor is not None and _count(head_dim):
        expect(isinstance(factor, (int, float)), "partial_rotary_factor to be a number", repr(factor))
        _put(given, "rotary_dim", int(head_dim * factor), "partial_rotary_factor")
    if "rotary_dim" not in given and _count(head_dim):
        given["rotary_dim"] = head_dim // 2


def vl(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of MiniMax-VL-01's config.json that say something, by our names."""
    given = {name: value for name, value in config.items() if name not in VL_INERT}
    expect(not {"text", "vision"} & set(given), "text_config and vision_config", "unknown text or vision")
    for name, allowed in VL_ONLY.items():
        only(name, given.pop(name, allowed[0]), allowed)
    if "image_token_index" in given:
        _put(given, "image_token_id", given.pop("image_token_index"), "image_token_index")
    if "image_grid_pinpoints" in given:
        given["image_grid_pinpoints"] = pairs(given["image_grid_pinpoints"])
    return given


def pairs(value: Any) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints, which some configs have as a string."""
    try:
        sizes = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((operator.index(w), operator.index(h)) for w, h in sizes)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            f"config: expected image_grid_pinpoints of pairs (width, height), got {value!r}"
        ) from None


def _put(given: dict[str, Any], name: str, value: Any, source: str) -> None:
    if name in given and _plain(given[name]) != _plain(value):
        raise ValueError(f"config: expected {source} to agree with {name} = {given[name]!r}, got {value!r}")
    given[name] = value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def strict(cls: type, title: str, given: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(cls)}
    kind = given.get("model_type", title)
    expect(kind in MODEL_TYPES[title], f"model_type {' or '.join(MODEL_TYPES[title][1:])}", repr(kind))
    kept = {}
    for name, value in given.items():
        if name in known:
            kept[name] = value
        elif name in _ONLY:
            only(name, value, _ONLY[name])
    unknown = sorted(set(given) - known - _INERT - set(_ONLY))
    expect(not unknown, f"the fields of {title}", f"unknown {', '.join(unknown)}")
    return kept


def only(name: str, value: Any, allowed: Iterable[Any]) -> None:
    allowed = tuple(allowed)
    expect(
        value in allowed, f"{name} = {allowed[0]!r}, as released (nothing else is implemented)", repr(value)
    )


def _integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> TypeGuard[int]:
    return _integer(value) and value > 0


def check_types(config: Any) -> None:
    """Numbers where there should be numbers: a string from a config.json must not get far."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind.startswith(("int", "tuple[int")):
            several = isinstance(value, tuple) and "tuple" in kind
            whole = all(map(_integer, value)) if several else kind.startswith("int") and _integer(value)
            expect(whole or value is None and "None" in kind, f"{field.name} to be {kind}", repr(value))
        if kind == "float":
            expect(number and math.isfinite(value), f"{field.name} to be a finite number", repr(value))


def expect(condition: bool, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"config: expected {expected}, got {got}")
