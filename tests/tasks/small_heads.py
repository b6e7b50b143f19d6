"""Options that make heads of transformers small enough to be tried by the dozen."""

_ATTENTION = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 8, **_ATTENTION}
_DAB = {"hidden_size": 32, **{name: value for name, value in _DETR.items() if name != "d_model"}}
_RT = {"d_model": 32, "encoder_hidden_dim": 32, "decoder_layers": 2, "num_queries": 8, "num_denoising": 6, **_ATTENTION}
_RF = {"d_model": 32, "decoder_layers": 2, "num_queries": 8, "group_detr": 2, "decoder_ffn_dim": 32}
_MASKS = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "decoder_layers": 3, "num_queries": 6}
_MASKFORMER = {"fpn_feature_size": 64, "mask_feature_size": 64, "decoder_config": {"model_type": "detr", **_DETR}}
SMALL = {
    "hf/detr": _DETR,
    "hf/conditional_detr": _DETR,
    "hf/dab_detr": _DAB,
    "hf/deformable_detr": _DETR,
    **dict.fromkeys(("hf/rt_detr", "hf/rt_detr_v2", "hf/d_fine", "hf/deimv2"), _RT),
    "hf/rf_detr": {**_RF, "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2},
    "hf/upernet": {"hidden_size": 16, "auxiliary_channels": 16},
    "hf/mask2former": {**_MASKS, "encoder_layers": 1, "dim_feedforward": 32, "num_attention_heads": 2},
    "hf/maskformer": _MASKFORMER,
}
