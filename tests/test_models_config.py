"""Configs as released and as transformers writes them; unknown, contradictory and mistyped fields."""

import json
from pathlib import Path
from typing import Any

import pytest
from models_support import tiny_config

from models import config
from models.config import TextConfig, VisionConfig, VLConfig

# The released config.json of MiniMax-Text-01.
RELEASED: dict[str, Any] = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_text_01",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}
TINY = tiny_config(0).to_dict()


def test_released_config_is_the_default() -> None:
    assert TextConfig.from_dict(RELEASED) == TextConfig()
    assert TextConfig().eos_token_ids == (200020,)


@pytest.mark.parametrize("seed", range(4))
def test_round_trips(seed: int, tmp_path: Path) -> None:
    """Through our config.json, and through transformers' with its names."""
    transformers = pytest.importorskip("transformers")
    text = tiny_config(seed, eos_token_id=(3, 5), sliding_window=[None, 9][seed % 2])
    (tmp_path / "config.json").write_text(json.dumps(text.to_dict()))
    assert TextConfig.from_file(tmp_path) == config.from_file(tmp_path / "config.json") == text
    theirs = transformers.MiniMaxConfig(**text.to_transformers())
    assert TextConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False))) == text
    del theirs.rotary_dim
    assert TextConfig.from_dict(theirs.to_dict()) == text, "half of a head is what RoPE turns by default"


def test_transformers_own_spellings() -> None:
    fields = {"head_dim": None, "num_key_value_heads": None, "rotary_dim": None, "hidden_size": 64}
    given = {**TINY, **fields, "num_attention_heads": 4}
    del given["rotary_dim"], given["rope_theta"]
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}
    text = TextConfig.from_dict({**given, "rope_parameters": rope})
    assert (text.head_dim, text.num_key_value_heads, text.rotary_dim, text.rope_theta) == (16, 4, 4, 5e6)


def test_vl_round_trip(tmp_path: Path) -> None:
    released = {
        "architectures": ["MiniMaxVL01ForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": [list(size) for size in VLConfig().image_grid_pinpoints],
        "image_seq_length": 576,
        "image_token_index": 200025,
        "model_type": "minimax_vl_01",
        "process_image_mode": "anyres",
        "projector_hidden_act": "gelu",
        "text_config": {**RELEASED, "max_position_embeddings": 8192},
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 6144,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    assert VLConfig.from_dict(released) == VLConfig()
    assert (
        VLConfig.from_dict({**released, "image_grid_pinpoints": str(released["image_grid_pinpoints"])})
        == VLConfig()
    )
    small = VLConfig(
        text=tiny_config(0, vocab_size=300),
        vision=VisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28),
        image_token_id=299,
        image_grid_pinpoints=((28, 28), (56, 28)),
    )
    (tmp_path / "config.json").write_text(json.dumps(small.to_dict()))
    assert config.from_file(tmp_path) == small
    assert len(VLConfig().image_grid_pinpoints) == 28


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_shared_experts": 1}, "unknown num_shared_experts"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types to agree with attn_type_list"),
        ({"layer_types": ["mamba"] * 4}, "layer_types of linear_attention, full_attention, got .*mamba"),
        ({"mlp_alpha_factor": 9.0}, "mlp_alpha_factor to agree with layernorm_mlp_alpha"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'default', got yarn"),
        ({"rope_parameters": {"rope_theta": 123.0}}, "to agree with rope_theta"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "to agree with rotary_dim"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling = None"),
        ({"num_hidden_layers": 5}, "attn_type_list of num_hidden_layers = 5"),
        ({"attn_type_list": [2, 0, 0, 0, 0, 0]}, "0 .lightning. and 1 .softmax."),
        ({"num_key_value_heads": 3}, "to divide num_attention_heads"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok <= num_local_experts"),
        ({"rotary_dim": 7}, "rotary_dim even"),
        ({"rotary_dim": 4096}, "at most head_dim"),
        ({"hidden_size": "64"}, "hidden_size to be int, got '64'"),
        ({"hidden_size": True}, "hidden_size to be int"),
        ({"hidden_size": 0}, "hidden_size >= 1"),
        ({"hidden_size": None, "head_dim": None}, "hidden_size and num_attention_heads for a head_dim"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"layernorm_mlp_beta": float("nan")}, "layernorm_mlp_beta to be a finite number"),
        ({"layernorm_mlp_beta": "1"}, "layernorm_mlp_beta to be a finite number"),
        ({"sliding_window": 0}, "sliding_window None or >= 1"),
        ({"eos_token_id": 97}, "special tokens below vocab_size = 97, got 97"),
        ({"eos_token_id": [1, -3]}, "special tokens"),
        ({"postnorm": False}, "postnorm = True, as released"),
        ({"shared_intermediate_size": 512}, "shared_intermediate_size = 0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = False"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise = 0"),
        ({"model_type": "llama"}, "model_type minimax_text_01 or minimax"),
        ({"eos_token_id": [1.0]}, "eos_token_id to be int"),
        ({"attn_type_list": None}, "attn_type_list to be tuple"),
        ({"attn_type_list": 5}, "attn_type_list to be tuple"),
        ({"layer_types": 5}, "layer_types to be a list"),
        ({"rope_parameters": [1]}, "rope_parameters to be an object"),
        ({"partial_rotary_factor": "a"}, "partial_rotary_factor to be a number"),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
            "rope_parameters to agree with partial_rotary_factor",
        ),
        ({"initializer_range": -1.0}, "initializer_range >= 0"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig.from_dict({**TINY, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_token_index": 97}, "image_token_id below vocab_size"),
        ({"image_grid_pinpoints": [[336, 300]]}, "multiples of image_size = 336"),
        ({"image_grid_pinpoints": "[336"}, "pairs"),
        ({"vision_feature_layer": -2}, "vision_feature_layer = -1"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "gelu"),
        ({"vision_config": {"layers": 3}}, "unknown layers"),
        ({"vision_config": {"image_size": 300}}, "divisible by patch_size"),
        ({"vision_config": {"num_attention_heads": 7}}, "divisible by 7 heads"),
        ({"language": 1}, "unknown language"),
        ({"text_config": None}, "a config of named fields"),
        ({"vision_config": None}, "a vision_config of named fields"),
        ({"text": 5}, "unknown text"),
        ({"image_token_index": 1.5}, "image_token_id to be int"),
        ({"image_grid_pinpoints": []}, "multiples of image_size"),
        ({"image_grid_pinpoints": [[0, 0]]}, "multiples of image_size"),
        ({"image_grid_pinpoints": [[336.5, 336]]}, "pairs"),
        ({"vision_config": {"image_size": 0}}, "image_size >= 1"),
        ({"vision_config": {"layer_norm_eps": -1.0}}, "layer_norm_eps > 0"),
        ({"vision_config": {"num_channels": 4}}, "num_channels = 3"),
        ({"vision_config": {"model_type": "siglip"}}, "model_type clip_vision_model"),
    ],
)
def test_wrong_vl_fields(fields: dict[str, Any], message: str) -> None:
    base = {"text_config": TINY, "vision_config": {}, "image_token_index": 96}
    with pytest.raises(ValueError, match=message):
        VLConfig.from_dict({**base, **fields})


def test_partial_rotary_factor_of_the_default_head() -> None:
    assert TextConfig.from_dict({"rope_parameters": {"partial_rotary_factor": 0.25}}).rotary_dim == 32


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a config.json, got .*config.json, which is not there"):
        config.from_file(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (("{", "expected JSON in"), ("[1]", "a JSON object in .*, got list")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            config.from_file(file)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="expected JSON in"):
        config.from_file(file)
