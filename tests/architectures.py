"""Tiny random models of many architectures, small enough that each is made in a moment.

Their weights are large, so that attention is sharp and a wrong mask, position or state shows.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as T

# What most configurations call their sizes; each architecture takes the names that it knows.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
ROTARY = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# Name -> (model type, what differs from SIZES; `...` leaves a size out). The tests' sequences have
# 90 to 400 tokens: windows of 32 are shorter than these, as windows of 4096 are than long prompts.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "llama-dynamic-rope": ("llama", {"rope_parameters": ROTARY | {"rope_type": "dynamic"}}),
    "llama-yarn": ("llama", {"rope_parameters": ROTARY | {"rope_type": "yarn"}}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": ROTARY
            | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 32}),
    "ministral": ("ministral", {"sliding_window": 32}),
    "mixtral": ("mixtral", LOCAL_EXPERTS | {"sliding_window": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "qwen2-moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
    "qwen3-next": ("qwen3_next", EXPERTS | LINEAR_ATTENTION | {"num_hidden_layers": 4}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 32, "num_hidden_layers": 6}),
    "gemma3n": (
        "gemma3n_text",
        {
            "num_hidden_layers": 5,
            "sliding_window": 32,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "intermediate_size": [64] * 5,
            "activation_sparsity_pattern": [0.0] * 5,
        },
    ),
    "recurrent-gemma": (
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 32},
    ),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [1.5, 2.0, 4.0, 8.0],
                "factor": 4.0,
            },
        },
    ),
    "phimoe": ("phimoe", LOCAL_EXPERTS | {"sliding_window": None}),
    "gpt2": ("gpt2", {"n_positions": 2048}),
    "gpt2-inverse-layer": ("gpt2", {"n_positions": 2048, "scale_attn_by_inverse_layer_idx": True}),
    "gpt-neo": (
        "gpt_neo",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 32,
        },
    ),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neox-japanese": ("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "gpt-bigcode": ("gpt_bigcode", {"n_positions": 2048}),
    "gptj": ("gptj", {"n_positions": 2048, "rotary_dim": 8}),
    "gpt-oss": ("gpt_oss", LOCAL_EXPERTS | {"sliding_window": 32}),
    "codegen": ("codegen", {"n_positions": 2048, "n_ctx": 2048, "rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "xglm": ("xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}),
    "biogpt": ("biogpt", {}),
    "bloom": ("bloom", {"n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048}),
    "falcon": ("falcon", {"head_dim": ...}),
    "falcon-alibi": ("falcon", {"head_dim": ..., "alibi": True}),
    "persimmon": ("persimmon", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 32}),
    "cohere": ("cohere", {"logit_scale": 1.0}),
    "cohere2": ("cohere2", {"logit_scale": 1.0, "sliding_window": 32, "num_hidden_layers": 4}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 32, "num_hidden_layers": 4}),
    "olmoe": ("olmoe", EXPERTS),
    "granite": ("granite", {}),
    "granite-moe": ("granitemoe", LOCAL_EXPERTS),
    "granite-moe-hybrid": (
        "granitemoehybrid",
        LOCAL_EXPERTS
        | MAMBA2
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "nemotron": ("nemotron", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4-moe": ("glm4_moe", ROUTED_EXPERTS),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "exaone4": ("exaone4", {"sliding_window": 32, "num_hidden_layers": 4}),
    "ernie": ("ernie4_5", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "helium": ("helium", {}),
    "arcee": ("arcee", {}),
    "seed-oss": ("seed_oss", {}),
    "apertus": ("apertus", {}),
    "bitnet": ("bitnet", {}),
    "diffllama": ("diffllama", {}),
    "deepseek-v2": ("deepseek_v2", ROUTED_EXPERTS | LATENT_ATTENTION),
    "deepseek-v3": (
        "deepseek_v3",
        ROUTED_EXPERTS | LATENT_ATTENTION | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    ),
    "llama4": (
        "llama4_text",
        LOCAL_EXPERTS
        | {
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 32,
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "jetmoe": (
        "jetmoe",
        LOCAL_EXPERTS | {"kv_channels": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "minimax": (
        "minimax",
        LOCAL_EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    ),
    "mamba": ("mamba", {"state_size": 4}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    "falcon-mamba": ("falcon_mamba", {"state_size": 4}),
    "jamba": (
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("bamba", MAMBA2 | {"attn_layer_indices": [1], "mamba_n_groups": 1}),
    "falcon-h1": ("falcon_h1", MAMBA2 | {"mamba_d_ssm": 64, "mamba_n_groups": 1}),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "rwkv": ("rwkv", {"context_length": 2048, "attention_hidden_size": 32}),
    "xlstm": ("xlstm", {"num_heads": 4, "num_blocks": 2, "mode": "inference"}),
    "doge": ("doge", {}),
}


def tiny_model(name: str, vocabulary: int, *, scale: float = 0.25, seed: int = 1) -> Any:
    """Return a random model of an architecture in float32 and evaluation mode."""
    kind, changes = ARCHITECTURES[name]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    settings = SIZES | tokens | {"vocab_size": vocabulary} | changes
    settings = {key: value for key, value in settings.items() if value is not ...}
    config = T.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(seed)
    model = T.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, scale)
    model.tie_weights()
    return model
