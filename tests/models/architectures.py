"""Tiny configurations of published architectures, as in their config.json."""

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 400,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "output_router_logits": True}
ARCHITECTURES = {
    "llama": {"rope_theta": 5e5, "attention_bias": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True, "vocab_size": 417},
    # Two layers, of which one sees 8 tokens; the embeddings are tied and scaled.
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "olmo2": {"num_key_value_heads": 4},
    # Of 8 experts and few tokens, some get none.
    "mixtral": {"num_local_experts": 8, "sliding_window": None, **EXPERTS},
}
OTHERS = {
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 16, "attention_chunk_size": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "doge": {"num_experts": 4},  # it makes a mask of its own from the one that it gets
    "bert-generation": {},  # not causal by itself
    "cohere2": {"sliding_window": 8},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        **{"first_k_dense_replace": 1, "num_key_value_heads": 4},
    },
}


def described(kind):
    """Return the tiny config.json of an architecture."""
    own = ARCHITECTURES.get(kind, OTHERS.get(kind))
    return {"model_type": kind, **SHAPE, **own}
