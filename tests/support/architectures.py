"""Settings of small models of several families."""

from __future__ import annotations

import transformers

from support.tiny import SMALL

VOCAB = 259
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 5}
ROUTER = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
TEXT = {**SMALL, "vocab_size": VOCAB}
VISION = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 14}
IMAGE = 258
MULTIMODAL = {
    "Gemma 3": transformers.Gemma3Config(
        text_config={**TEXT, **HEADS, **WINDOW},
        vision_config={**VISION, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=256, eoi_token_index=257,
    ),
    "Qwen2.5-VL": transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        image_token_id=IMAGE, video_token_id=257, vision_start_token_id=256, vision_end_token_id=255,
        bos_token_id=None, eos_token_id=1,
    ),
}  # fmt: skip
