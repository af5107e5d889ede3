"""The models' configurations, read strictly from the released `config.json` or from transformers' `MiniMaxConfig`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIGHTNING, SOFTMAX = 0, 1  # the values in attn_type_list
END_OF_SENTENCE = 200020

# transformers' names -> the released ones
_TRANSFORMERS = {
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}
_LAYER_TYPES = {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}

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
    "shared_intermediate_size": (0, None),
    "shared_moe_mode": ("sigmoid", None),
    "postnorm": (True,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """MiniMax-Text-01; the defaults are the released values, the names those of the released `config.json`.

    attn_type_list: for each layer 0 (lightning) or 1 (softmax). rotary_dim: how many of a softmax head's dimensions
    RoPE turns. layernorm_*_alpha weighs the residual, beta the block's output. eos_token_id: one id or several; None, as
    the release has it, is 200020 where the vocabulary goes so far.
    """

    vocab_size: int = 200064
    hidden_size: int = 6144
    intermediate_size: int = 9216
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_local_experts: int = 32
    num_experts_per_tok: int = 2
    attn_type_list: tuple[int, ...] = ((LIGHTNING,) * 7 + (SOFTMAX,)) * 10
    rotary_dim: int = 64
    rope_theta: float = 1e7
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 10_240_000
    sliding_window: int | None = None
    layernorm_full_attention_alpha: float = 160**0.25
    layernorm_full_attention_beta: float = 1.0
    layernorm_linear_attention_alpha: float = 160**0.25
    layernorm_linear_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = 160**0.25
    layernorm_mlp_beta: float = 1.0
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.001
    pad_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim num_local_experts num_experts_per_tok max_position_embeddings"
        )
        for name in sizes.split():
            _expect(getattr(self, name) >= 1, f"{name} >= 1", getattr(self, name))
        L, types = self.num_hidden_layers, self.attn_type_list
        _expect(len(types) == L, f"attn_type_list of num_hidden_layers = {L} entries", len(types))
        _expect(set(types) <= {LIGHTNING, SOFTMAX}, "attn_type_list of 0 (lightning) and 1 (softmax)", types)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        _expect(heads % groups == 0, f"num_key_value_heads to divide num_attention_heads = {heads}", groups)
        experts, k = self.num_local_experts, self.num_experts_per_tok
        _expect(k <= experts, f"num_experts_per_tok <= num_local_experts = {experts}", k)
        r, d = self.rotary_dim, self.head_dim
        _expect(0 <= r <= d and r % 2 == 0, f"rotary_dim even and at most head_dim = {d}", r)
        _expect(self.rope_theta > 0 and self.rms_norm_eps > 0, "rope_theta and rms_norm_eps > 0", self)
        window = self.sliding_window
        _expect(window is None or window >= 1, "sliding_window None or >= 1", window)
        for token in (*self.eos_token_ids, *([] if self.pad_token_id is None else [self.pad_token_id])):
            _expect(
                0 <= token < self.vocab_size, f"special tokens below vocab_size = {self.vocab_size}", token
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        if ids is None:
            return (END_OF_SENTENCE,) if END_OF_SENTENCE < self.vocab_size else ()
        return (ids,) if isinstance(ids, int) else ids

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TextConfig:
        """From the fields of a released `config.json` or of transformers' `MiniMaxConfig.to_dict()`.

        A config without rotary_dim turns half of a head's dimensions, as the released network does (transformers' own
        forward turns all). Raises ValueError for a field that is unknown, that contradicts another, or that asks for what
        this network does not have.
        """
        given = dict(fields)
        _lift_aliases(given)
        _lift_rope(given)
        if given.get("head_dim", 1) is None:
            given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
        if "rotary_dim" not in given and "head_dim" in given:
            given["rotary_dim"] = given["head_dim"] // 2
        if given.get("num_key_value_heads", 1) is None:
            given["num_key_value_heads"] = given["num_attention_heads"]
        for name in ("eos_token_id", "attn_type_list"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**_strict(cls, "TextConfig", given))

    @classmethod
    def from_file(cls, path: str | Path) -> TextConfig:
        """`path`: a config.json, or a directory that has one."""
        return cls.from_dict(read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """As the released `config.json` has it."""
        fields = dataclasses.asdict(self)
        return {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "model_type": "minimax_text_01",
            "hidden_act": "silu",
            "postnorm": True,
            "shared_intermediate_size": 0,
            "tie_word_embeddings": False,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()},
        }

    def to_transformers(self) -> dict[str, Any]:
        """The arguments of `transformers.MiniMaxConfig` for the same network, but for RoPE, which turns all of a
        head's dimensions there whatever a config says.
        """
        fields = dataclasses.asdict(self)
        types = {value: name for name, value in _LAYER_TYPES.items()}
        renamed = {theirs: fields.pop(ours) for theirs, ours in _TRANSFORMERS.items()}
        rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        layers = [types[t] for t in fields.pop("attn_type_list")]
        if isinstance(fields["eos_token_id"], tuple):
            fields["eos_token_id"] = list(fields["eos_token_id"])
        return {**fields, **renamed, "rope_parameters": rope, "layer_types": layers, "bos_token_id": None}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The ViT of MiniMax-VL-01, in the layout of CLIP; the defaults are the released values."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        _check_types(self)
        heads, patch = self.num_attention_heads, self.patch_size
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "patch_size",
        ):
            _expect(getattr(self, name) >= 1, f"vision {name} >= 1", getattr(self, name))
        _expect(self.hidden_size % heads == 0, f"hidden_size divisible by {heads} heads", self.hidden_size)
        _expect(
            self.image_size % patch == 0, f"image_size divisible by patch_size = {patch}", self.image_size
        )
        _expect(self.hidden_act == "gelu", "hidden_act 'gelu' (exact)", self.hidden_act)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VisionConfig:
        # CLIP's own: the projection and the vocabulary belong to its text half.
        clip = {"attention_dropout", "dropout", "initializer_factor", "initializer_range", "num_channels"}
        given = {
            name: value
            for name, value in fields.items()
            if name not in clip | {"projection_dim", "vocab_size"}
        }
        return cls(**_strict(cls, "VisionConfig", given))


def _default_grid() -> tuple[tuple[int, int], ...]:
    """The 28 sizes (width, height) of the release, in its order."""
    small = [(w, h) for w in (336, 672, 1008) for h in (336, 672, 1008, 1344, 1680, 2016)]
    middle = [(1344, h) for h in (336, 672, 1008, 1344)]
    return (*small, *middle, *((w, h) for w in (1680, 2016) for h in (336, 672, 1008)))


@dataclass(frozen=True, kw_only=True)
class VLConfig:
    """MiniMax-VL-01: the text model, the ViT, and what joins them."""

    text: TextConfig = dataclasses.field(default_factory=lambda: TextConfig(max_position_embeddings=8192))
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    image_token_id: int = 200025
    image_grid_pinpoints: tuple[tuple[int, int], ...] = dataclasses.field(default_factory=_default_grid)

    def __post_init__(self) -> None:
        token, size = self.image_token_id, self.text.vocab_size
        _expect(0 <= token < size, f"image_token_id below vocab_size = {size}", token)
        side = self.vision.image_size
        for w, h in self.image_grid_pinpoints:
            _expect(
                w % side == h % side == 0, f"image_grid_pinpoints in multiples of image_size = {side}", (w, h)
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VLConfig:
        """From the fields of the released MiniMax-VL-01 `config.json`; errors as of `TextConfig.from_dict`."""
        given = {name: value for name, value in fields.items() if name not in _VL_INERT}
        for name, allowed in _VL_ONLY.items():
            _only(name, given.pop(name, allowed[0]), allowed)
        if "image_token_index" in given:
            given["image_token_id"] = given.pop("image_token_index")
        for part, kind in (("text", TextConfig), ("vision", VisionConfig)):
            if f"{part}_config" in given:
                given[part] = kind.from_dict(given.pop(f"{part}_config"))
        if "image_grid_pinpoints" in given:
            given["image_grid_pinpoints"] = tuple((w, h) for w, h in given["image_grid_pinpoints"])
        return cls(**_strict(cls, "VLConfig", given))


_VL_INERT = frozenset(
    {"ignore_index", "image_seq_length", "process_image_mode", "img_token_compression_config"}
)
_VL_ONLY: dict[str, tuple[Any, ...]] = {
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
    if not isinstance(fields, dict):
        raise TypeError(f"config: expected a JSON object in {file}, got {type(fields).__name__}")
    return fields


def from_file(path: str | Path) -> TextConfig | VLConfig:
    """The config at `path` (a config.json or its directory), of whichever model it is."""
    fields = read_json(path)
    return VLConfig.from_dict(fields) if "vision_config" in fields else TextConfig.from_dict(fields)


def _lift_aliases(given: dict[str, Any]) -> None:
    for theirs, ours in _TRANSFORMERS.items():
        if theirs in given:
            _put(given, ours, given.pop(theirs), theirs)
    if given.get("layer_types") is not None:
        unknown = set(given["layer_types"]) - set(_LAYER_TYPES)
        _expect(not unknown, f"layer_types of {', '.join(_LAYER_TYPES)}", sorted(map(str, unknown)))
        types = [_LAYER_TYPES[name] for name in given["layer_types"]]
        _put(given, "attn_type_list", types, "layer_types")
    given.pop("layer_types", None)


def _lift_rope(given: dict[str, Any]) -> None:
    rope = dict(given.pop("rope_parameters", None) or {})
    kind = rope.pop("rope_type", "default")
    _expect(kind == "default", "rope_parameters of rope_type 'default'", kind)
    if "partial_rotary_factor" in rope:
        heads = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
        _put(given, "rotary_dim", int(heads * rope.pop("partial_rotary_factor")), "partial_rotary_factor")
    if "rope_theta" in rope:
        _put(given, "rope_theta", rope.pop("rope_theta"), "rope_parameters")
    _expect(not rope, "rope_parameters of rope_theta, rope_type and partial_rotary_factor", sorted(rope))


def _put(given: dict[str, Any], name: str, value: Any, source: str) -> None:
    if name in given and _plain(given[name]) != _plain(value):
        raise ValueError(f"config: expected {source} to agree with {name} = {given[name]!r}, got {value!r}")
    given[name] = value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _strict(cls: type, title: str, given: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(cls)}
    kept = {}
    for name, value in given.items():
        if name in known:
            kept[name] = value
        elif name in _ONLY:
            _only(name, value, _ONLY[name])
    unknown = sorted(set(given) - known - _INERT - set(_ONLY))
    _expect(not unknown, f"the fields of {title}", f"unknown {', '.join(unknown)}")
    return kept


def _only(name: str, value: Any, allowed: Iterable[Any]) -> None:
    allowed = tuple(allowed)
    _expect(
        value in allowed, f"{name} = {allowed[0]!r}, as released (nothing else is implemented)", repr(value)
    )


def _check_types(config: Any) -> None:
    """Numbers where there should be numbers: a string from a config.json must not get far."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind.startswith("int") and not (
            isinstance(value, int) and number or value is None and "None" in kind
        ):
            _expect("tuple" in kind and isinstance(value, tuple), f"{field.name} to be an int", repr(value))
        if kind == "float":
            _expect(number, f"{field.name} to be a number", repr(value))


def _expect(condition: bool, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"config: expected {expected}, got {got}")
