"""Small models of many tasks, each with fresh weights."""

import torch
import transformers as t


_LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_TEXT = {"vocab_size": 40, "max_position_embeddings": 32}
_PIXELS = {"image_size": 32, "patch_size": 8}
_VISION = {**_LAYER, **_PIXELS}
_WORDS = {**_LAYER, **_TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WAV2VEC2 = {
    **_LAYER,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
    "classifier_proj_size": 8,
}
_GPT2 = {
    "vocab_size": 40,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16}
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_WHISPER |= {"begin_suppress_tokens": None, "suppress_tokens": None}
_AST = {**_LAYER, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
_MAE = {**_VISION, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
_YOLOS = {**_VISION, "image_size": [32, 40], "num_detection_tokens": 4}
_PVT = {"image_size": {"height": 32, "width": 32}, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_PVT |= {"num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [1, 1, 1, 1]}
_PERCEIVER = {"num_latents": 4, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 1, "image_size": 24}
_PERCEIVER |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
_SIGLIP2 = {**_LAYER, "num_patches": 16, "patch_size": 4}

_OF = {
    "BertForSequenceClassification": lambda: t.BertConfig(**_WORDS),
    "BertForQuestionAnswering": lambda: t.BertConfig(**_WORDS),
    "BertForMaskedLM": lambda: t.BertConfig(**_WORDS),
    "GPT2LMHeadModel": lambda: t.GPT2Config(**_GPT2),
    "GPT2ForSequenceClassification": lambda: t.GPT2Config(**_GPT2),
    "LlamaForCausalLM": lambda: t.LlamaConfig(**_WORDS),
    "T5ForConditionalGeneration": lambda: t.T5Config(**_T5),
    "BartForSequenceClassification": lambda: t.BartConfig(**_BART),
    "Wav2Vec2ForSequenceClassification": lambda: t.Wav2Vec2Config(**_WAV2VEC2),
    "ASTForAudioClassification": lambda: t.ASTConfig(**_AST),
    "WhisperForConditionalGeneration": lambda: t.WhisperConfig(**_WHISPER),
    "ViTMAEForPreTraining": lambda: t.ViTMAEConfig(**_MAE),
    "YolosForObjectDetection": lambda: t.YolosConfig(**_YOLOS),
    "CLIPForImageClassification": lambda: t.CLIPConfig(text_config=_WORDS, vision_config=_VISION, projection_dim=8),
    "SiglipForImageClassification": lambda: t.SiglipConfig(text_config=_WORDS, vision_config=_VISION),
    "Siglip2ForImageClassification": lambda: t.Siglip2Config(text_config=_WORDS, vision_config=_SIGLIP2),
    "PvtV2ForImageClassification": lambda: t.PvtV2Config(**_PVT),
    "PerceiverForImageClassificationLearned": lambda: t.PerceiverConfig(**_PERCEIVER),
    "ViTForImageClassification": lambda: t.ViTConfig(**_VISION),
}
NAMES = tuple(_OF)


def tiny(name: str, seed: int = 0, **changes):
    """A model of this class of transformers."""
    torch.manual_seed(seed)
    config = _OF[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return getattr(t, name)(config)
