"""The models' configurations, read strictly from the released `config.json` or from transformers' `MiniMaxConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import fields
from .fields import LIGHTNING, SOFTMAX

END_OF_SENTENCE = 200020


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
        fields.check_types(self)
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim num_local_experts num_experts_per_tok max_position_embeddings"
        )
        for name in sizes.split():
            fields.expect(getattr(self, name) >= 1, f"{name} >= 1", getattr(self, name))
        L, types = self.num_hidden_layers, self.attn_type_list
        fields.expect(len(types) == L, f"attn_type_list of num_hidden_layers = {L} entries", len(types))
        fields.expect(
            set(types) <= {LIGHTNING, SOFTMAX}, "attn_type_list of 0 (lightning) and 1 (softmax)", types
        )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        fields.expect(
            heads % groups == 0, f"num_key_value_heads to divide num_attention_heads = {heads}", groups
        )
        experts, k = self.num_local_experts, self.num_experts_per_tok
        fields.expect(k <= experts, f"num_experts_per_tok <= num_local_experts = {experts}", k)
        r, d = self.rotary_dim, self.head_dim
        fields.expect(0 <= r <= d and r % 2 == 0, f"rotary_dim even and at most head_dim = {d}", r)
        numbers = (self.rope_theta, self.rms_norm_eps)
        fields.expect(min(numbers) > 0, "rope_theta and rms_norm_eps > 0", numbers)
        fields.expect(self.initializer_range >= 0, "initializer_range >= 0", self.initializer_range)
        window = self.sliding_window
        fields.expect(window is None or window >= 1, "sliding_window None or >= 1", window)
        for token in (*self.eos_token_ids, *([] if self.pad_token_id is None else [self.pad_token_id])):
            fields.expect(
                0 <= token < self.vocab_size, f"special tokens below vocab_size = {self.vocab_size}", token
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        if ids is None:
            return (END_OF_SENTENCE,) if END_OF_SENTENCE < self.vocab_size else ()
        return (ids,) if isinstance(ids, int) else ids

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TextConfig:
        """From the fields of a released `config.json` or of transformers' `MiniMaxConfig.to_dict()`.

        A config without rotary_dim turns half of a head's dimensions, as the released network does (transformers' own
        forward turns all). Raises ValueError for a field that is unknown, that contradicts another, or that asks for what
        this network does not have.
        """
        fields.expect(isinstance(config, Mapping), "a config of named fields", type(config).__name__)
        given = dict(config)
        fields.lift_aliases(given)
        fields.fill_heads(given)
        fields.lift_rope(given)
        for name in ("eos_token_id", "attn_type_list"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**fields.strict(cls, "TextConfig", given))

    @classmethod
    def from_file(cls, path: str | Path) -> TextConfig:
        """`path`: a config.json, or a directory that has one."""
        return cls.from_dict(fields.read_json(path))

    def to_dict(self) -> dict[str, Any]:
        """As the released `config.json` has it."""
        values = dataclasses.asdict(self)
        return {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "model_type": "minimax_text_01",
            "hidden_act": "silu",
            "postnorm": True,
            "shared_intermediate_size": 0,
            "tie_word_embeddings": False,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
        }

    def to_transformers(self) -> dict[str, Any]:
        """The arguments of `transformers.MiniMaxConfig` for the same network, but for RoPE, which turns all of a
        head's dimensions there whatever a config says.
        """
        values = dataclasses.asdict(self)
        types = {value: name for name, value in fields.LAYER_TYPES.items()}
        renamed = {theirs: values.pop(ours) for theirs, ours in fields.TRANSFORMERS.items()}
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        layers = [types[t] for t in values.pop("attn_type_list")]
        if isinstance(values["eos_token_id"], tuple):
            values["eos_token_id"] = list(values["eos_token_id"])
        return {**values, **renamed, "rope_parameters": rope, "layer_types": layers, "bos_token_id": None}


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
        fields.check_types(self)
        heads, patch = self.num_attention_heads, self.patch_size
        sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
        for name in sizes.split():
            fields.expect(getattr(self, name) >= 1, f"vision {name} >= 1", getattr(self, name))
        hidden, side = self.hidden_size, self.image_size
        fields.expect(hidden % heads == 0, f"hidden_size divisible by {heads} heads", hidden)
        fields.expect(side % patch == 0, f"image_size divisible by patch_size = {patch}", side)
        fields.expect(self.layer_norm_eps > 0, "layer_norm_eps > 0", self.layer_norm_eps)
        fields.expect(self.hidden_act == "gelu", "hidden_act 'gelu' (exact)", self.hidden_act)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VisionConfig:
        fields.expect(isinstance(config, Mapping), "a vision_config of named fields", type(config).__name__)
        given = {name: value for name, value in config.items() if name not in fields.CLIP_INERT}
        return cls(**fields.strict(cls, "VisionConfig", given))


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
        fields.check_types(self)
        parts = isinstance(self.text, TextConfig) and isinstance(self.vision, VisionConfig)
        fields.expect(parts, "text_config and vision_config", (self.text, self.vision))
        token, size = self.image_token_id, self.text.vocab_size
        fields.expect(0 <= token < size, f"image_token_id below vocab_size = {size}", token)
        side = self.vision.image_size
        grid = self.image_grid_pinpoints
        whole = all(w >= side and h >= side and w % side == h % side == 0 for w, h in grid)
        fields.expect(bool(grid) and whole, f"image_grid_pinpoints in multiples of image_size = {side}", grid)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VLConfig:
        """From the fields of the released MiniMax-VL-01 `config.json`; errors as of `TextConfig.from_dict`."""
        given = fields.vl(config)
        for part, kind in (("text", TextConfig), ("vision", VisionConfig)):
            if f"{part}_config" in given:
                given[part] = kind.from_dict(given.pop(f"{part}_config"))
        return cls(**fields.strict(cls, "VLConfig", given))

    def to_dict(self) -> dict[str, Any]:
        """As the released `config.json` has it."""
        return {
            "architectures": ["MiniMaxVL01ForConditionalGeneration"],
            "model_type": "minimax_vl_01",
            "image_token_index": self.image_token_id,
            "image_grid_pinpoints": [list(size) for size in self.image_grid_pinpoints],
            "process_image_mode": "anyres",
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "text_config": self.text.to_dict(),
            "vision_config": {"model_type": "clip_vision_model", **dataclasses.asdict(self.vision)},
        }


def from_file(path: str | Path) -> TextConfig | VLConfig:
    """The config at `path` (a config.json or its directory), of whichever model it is."""
    config = fields.read_json(path)
    return VLConfig.from_dict(config) if "vision_config" in config else TextConfig.from_dict(config)
