"""The layout table: where attention and FFN projections are, and what stock forwards accept.

Layouts are matched by child names and shapes, so a family never seen before is usually
covered. Whether a forward takes narrower weights is known only for the classes listed in
``NATIVE``; every other class gets padded projections, which are exact under any forward.

To add an architecture, add a row. To let its forward run natively, add a model to
``vlprune.testing.families`` and the class to ``NATIVE`` under that model's name; the
conformance suite decides whether the row is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

__all__ = [
    "ATTENTION",
    "DENSE",
    "DENSE_CHILDREN",
    "FFN",
    "GROUPS",
    "HEAD_COUNTS",
    "HEAD_SIZES",
    "NATIVE",
    "ONE_CACHE",
    "OUTPUT_GATES",
    "PADDED",
    "TIED",
    "WIDTHS",
    "WRAPPERS",
    "Native",
]


@dataclass(frozen=True)
class Attention:
    """Child paths of an attention block. ``qkv`` is one fused projection, rows [q | k | v].

    ``q`` and ``k`` are empty where attention weights do not come from a dot product
    (deformable attention), ``v`` where the keys are the values, ``k`` and ``v`` where those of
    another layer are read.
    Attention in both directions has several ``v`` and ``o``.
    """

    q: str = ""
    k: str = ""
    v: tuple[str, ...] = ()
    o: tuple[str, ...] = ()
    qkv: str = ""


@dataclass(frozen=True)
class Ffn:
    """Child paths of an FFN. ``gate`` exists in gated MLPs; ``fused`` rows are [gate | up].

    ``listed`` projections must be the only layers of their list: any model has lists of layers.
    """

    up: str
    down: str
    gate: str = ""
    fused: bool = False
    listed: bool = False


ATTENTION = (
    Attention(  # Gemma 4 vision, before the row of the same names
        "q_proj.linear", "k_proj.linear", ("v_proj.linear",), ("o_proj.linear",)
    ),
    Attention(  # Gemma 4 audio
        "q_proj.linear", "k_proj.linear", ("v_proj.linear",), ("post.linear",)
    ),
    Attention("attn.q_proj", "attn.k_proj", ("attn.v_proj",), ("post",)),  # Gemma 3n audio
    Attention("q_proj", "k_proj", ("v_proj",), ("out_proj",)),  # CLIP, SigLIP, OPT, Bart
    Attention("q_proj", "k_proj", ("v_proj",), ("o_proj",)),  # ViT, DETR, Swin, LLaMA, Qwen
    Attention("q_proj", "k_proj", o=("o_proj",)),  # the full layers of large Gemma 4
    Attention("q_proj", o=("o_proj",)),  # the last layers of Gemma 3n and Gemma 4
    Attention("q_proj", "k_proj", ("v_proj",), ("projection_layer",)),  # InternVL
    Attention("q_proj", "k_proj", ("v_proj",), ("dense",)),  # Phi
    Attention("q_proj", "k_proj", ("v_proj",), ("proj",)),  # Kimi vision
    Attention("q_proj", "k_proj", ("v_proj",), ("Wo",)),  # ModernBERT as a decoder
    Attention("q", "k", ("v",), ("o",)),  # T5
    Attention("q", "k", ("v",), ("proj",)),  # Qwen2.5-Omni vision
    Attention("query", "key", ("value",), ("proj",)),  # V-JEPA 2, PVT v2
    Attention(  # CvT
        "attention.projection_query",
        "attention.projection_key",
        ("attention.projection_value",),
        ("output.dense",),
    ),
    Attention("query", "key", ("value",), ("output",)),  # Pix2Struct
    Attention("q_lin", "k_lin", ("v_lin",), ("out_lin",)),  # DistilBERT
    Attention("query", "key", ("value",), ("out_proj",)),  # Grounding DINO
    Attention("self.query", "self.key", ("self.value",), ("output.dense",)),  # BERT, BLIP text
    Attention(  # LED
        "longformer_self_attn.query",
        "longformer_self_attn.key",
        ("longformer_self_attn.value",),
        ("output",),
    ),
    Attention(  # DeBERTa v2
        "self.query_proj", "self.key_proj", ("self.value_proj",), ("output.dense",)
    ),
    Attention(  # TVP, before the row whose output is that of the FFN here
        "attention.query", "attention.key", ("attention.value",), ("attention.dense",)
    ),
    Attention("attention.query", "attention.key", ("attention.value",), ("output.dense",)),
    Attention("att.query", "att.key", ("att.value",), ("output.dense",)),  # LXMERT, across
    Attention(  # Grounding DINO fusion: text reads vision, vision reads text
        "vision_proj",
        "text_proj",
        ("values_vision_proj", "values_text_proj"),
        ("out_text_proj", "out_vision_proj"),
    ),
    Attention(v=("value_proj",), o=("output_proj",)),  # deformable attention
    Attention(v=("v_proj",), o=("output_proj",)),  # Aimv2 pooling, whose query is a parameter
    Attention(qkv="qkv", o=("projection",)),  # BLIP
    Attention(qkv="qkv", o=("proj",)),  # Qwen-VL vision, Florence-2, timm
    Attention(qkv="attention.qkv", o=("output.dense",)),  # TimeSformer
    Attention(qkv="c_attn", o=("c_proj",)),  # GPT-2 (Conv1D)
    Attention(qkv="qkv_proj", o=("o_proj",)),  # Phi-3
    Attention(qkv="Wqkv", o=("Wo",)),  # ModernBERT
    Attention(qkv="query_key_value", o=("dense",)),  # GPT-NeoX, Fuyu
)

FFN = (
    Ffn("up_proj.linear", "down_proj.linear", gate="gate_proj.linear"),  # Gemma 4 vision
    Ffn("up_proj", "down_proj", gate="gate_proj"),  # LLaMA, Qwen, Gemma
    Ffn("up_proj", "down_proj"),  # DINOv3, Nemotron, Arcee
    Ffn("gate_up_proj", "down_proj", fused=True),  # Phi-3
    Ffn("weights_in", "weights_out", fused=True),  # DINOv2 SwiGLU
    Ffn("input_linear", "output_linear", fused=True),  # the shared expert of Granite MoE
    Ffn("wi_1", "wo", gate="wi_0"),  # T5 v1.1
    Ffn("wi", "wo"),  # T5
    Ffn("w3", "w2", gate="w1"),  # LFM2
    Ffn("Wi", "Wo", fused=True),  # ModernBERT
    Ffn("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Fuyu
    Ffn("proj_in", "proj_out"),  # SAM 2
    Ffn("ffw_layer_1.linear", "ffw_layer_2.linear"),  # Gemma 4 audio
    Ffn("ffw_layer_1", "ffw_layer_2"),  # Gemma 3n audio
    Ffn("fc1", "fc2"),
    Ffn("lin1", "lin2"),
    Ffn("linear1", "linear2"),
    Ffn("linear_fc1", "linear_fc2"),
    Ffn("c_fc", "c_proj"),
    Ffn("dense1", "dense2"),  # Perceiver
    Ffn("fc_in", "fc_out"),  # GPT-J, CodeGen
    Ffn("pwconv1", "pwconv2"),  # ConvNeXt
    Ffn("pointwise_conv1", "pointwise_conv2"),  # ConvNeXt of DINOv3
    Ffn("intermediate.dense", "output.dense"),
    Ffn("intermediate_dense", "output_dense"),  # wav2vec 2 and its like
    Ffn("intermediate_query.dense", "output_query.dense"),
    Ffn("lang_inter.dense", "lang_output.dense"),  # LXMERT
    Ffn("visn_inter.dense", "visn_output.dense"),
    Ffn("mlp.layers.0", "mlp.layers.1", listed=True),  # D-FINE
)

# Modules around a projection that change its values one by one, and zero not at all.
WRAPPERS = ("Gemma4ClippableLinear", "DiffusionGemmaClippableLinear")

# Attributes that stock modules read in their forward, by meaning.
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_COUNTS = ("num_key_value_heads",)
GROUPS = ("num_key_value_groups", "n_rep")
WIDTHS = ("all_head_size", "split_size")

# Projections beside those of a row that gate what all heads give, before the output projection.
OUTPUT_GATES = ("gate_proj", "g_proj")


@dataclass(frozen=True)
class Native:
    """What a stock attention forward accepts without padding.

    ``family`` names the family or variant of :mod:`vlprune.testing` in which the class is cut
    natively, so that every row is tested. ``head``: the forward accepts fewer heads.
    ``head_dim``: smaller heads, of the same size for q, k and v. ``qk_vo``: value heads of
    another size than query heads. ``fold``: the forward derives the softmax temperature from the
    head size. ``rotary``: dimensions i and i + size/2 of a head are one unit, and a subclass hands
    the forward the angles of those that stay; dimensions that are not turned are units by
    themselves. ``swap``: vlprune's subclass takes over the forward.
    ``widths``: further attributes equal to heads x head size. ``per_head``: parameters with one
    column per head, as (path below the block, axis).
    """

    family: str
    head: bool = True
    head_dim: bool = True
    qk_vo: bool = False
    fold: bool = False
    rotary: bool = False
    swap: str = ""
    widths: tuple[str, ...] = ()
    per_head: tuple[tuple[str, int], ...] = ()


PADDED = Native("", head=False, head_dim=False)
"""The entry for any forward about which nothing is known: it accepts neither change."""


def _rows(accepts: Callable[[str], Native], **families: str) -> dict[str, Native]:
    """One row per class, given as ``ClassName="the family that tests it"``."""
    return {name: accepts(family) for name, family in families.items()}


NATIVE: dict[str, Native] = {
    # the forward views its projections as (..., -1, head_dim) and keeps its own scale
    **_rows(
        Native,
        JambaAttention="jamba",  # positions come from its recurrent layers
        NemotronHAttention="nemotron_h",
        CLIPAttention="clip",
        SiglipAttention="siglip",
        Siglip2Attention="siglip2",
        AltCLIPAttention="altclip",
        AltRobertaSelfAttention="altclip",
        Aimv2Attention="aimv2",
        ChineseCLIPTextSelfAttention="chinese_clip",
        ChineseCLIPVisionAttention="chinese_clip",
        MetaClip2Attention="metaclip2",
        GitVisionAttention="git",
        DPTSelfAttention="dpt",
        YolosSelfAttention="yolos",
        ViTMSNAttention="vit_msn",
        IJepaAttention="ijepa",
        SamAttention="sam",
        CLIPSegAttention="clipseg",
        OwlViTAttention="owlvit",
        Owlv2Attention="owlv2",
        ViTAttention="vit",
        DeiTAttention="deit",
        Dinov2Attention="dinov2",
        Dinov2WithRegistersAttention="vision_text_dual_encoder",
        DetrSelfAttention="detr",
        DetrCrossAttention="detr",
        RTDetrSelfAttention="rt_detr",
        RTDetrV2SelfAttention="rt_detr_v2",
        DFineSelfAttention="d_fine",
        ConditionalDetrSelfAttention="conditional_detr",
        DeformableDetrSelfAttention="deformable_detr",
        BertSelfAttention="bert",
        BertCrossAttention="bert_decoder",
        RobertaSelfAttention="roberta",
        RobertaCrossAttention="roberta_decoder",
        XLMRobertaSelfAttention="vision_text_dual_encoder",
        DistilBertSelfAttention="distilbert",
        BartAttention="florence2",
        OPTAttention="blip2",
        SmolVLMVisionAttention="smolvlm",
        Idefics3VisionAttention="idefics3",
        Idefics2VisionAttention="idefics2",
        Blip2QFormerMultiHeadAttention="blip2",
        InstructBlipQFormerMultiHeadAttention="instructblip",
        BridgeTowerSelfAttention="bridgetower",
        BridgeTowerCrossAttention="bridgetower",
        GPT2Attention="gpt2",
        VitPoseBackboneSelfAttention="vitpose_backbone",
        ViTMAEAttention="vit_mae",
        PixioAttention="pixio",
        RadioAttention="radio",
        VideoMAESelfAttention="videomae",
        VivitAttention="vivit",
        VideoPrismAttention="videoprism_vision_model",
        Tipsv2VisionAttention="tipsv2",
        Tipsv2TextAttention="tipsv2",
        SegformerAttention="segformer",
        XCLIPAttention="xclip",
        XCLIPCrossAttention="xclip",
        Deimv2SelfAttention="deimv2",
        PPDocLayoutV2SelfAttention="pp_doclayout_v2",
        PPDocLayoutV3SelfAttention="pp_doclayout_v3",
        PPDocLayoutV4SelfAttention="pp_doclayout_v4",
        LwDetrAttention="lw_detr",
        LwDetrViTAttention="lw_detr",
        RfDetrAttention="rf_detr",
        RfDetrDinov2Attention="rf_detr",
        MaskFormerDetrSelfAttention="maskformer",
        MaskFormerDetrCrossAttention="maskformer",
        VideomtAttention="videomt",
        SamHQAttention="sam_hq",
        Sam2Attention="sam2",
        Sam2MultiScaleAttention="sam2",
        Ovis2VisionAttention="ovis2",
        MllamaVisionAttention="mllama",
        IdeficsVisionAttention="idefics",
        InstructBlipVideoQFormerMultiHeadAttention="instructblipvideo",
        Kosmos2_5TextAttention="kosmos2_5",
        Kosmos2_5VisionAttention="kosmos2_5",
        MiniCPMV4_6VisionAttention="minicpmv4_6",
        HunYuanVLVisionAttention="hunyuan_vl",
        Cosmos3EdgeVisionAttention="cosmos3_edge",
        CamembertSelfAttention="camembert",
        CamembertCrossAttention="camembert",
        ElectraSelfAttention="electra",
        ElectraCrossAttention="electra",
        ErnieSelfAttention="ernie",
        ErnieCrossAttention="ernie",
        Data2VecTextSelfAttention="data2vec_text",
        Data2VecTextCrossAttention="data2vec_text",
        RobertaPreLayerNormSelfAttention="roberta_prelayernorm",
        RobertaPreLayerNormCrossAttention="roberta_prelayernorm",
        XLMRobertaXLSelfAttention="xlm_roberta_xl",
        XLMRobertaXLCrossAttention="xlm_roberta_xl",
        BertGenerationSelfAttention="bert_generation",
        BertGenerationCrossAttention="bert_generation",
        RoCBertSelfAttention="roc_bert",
        SplinterSelfAttention="splinter",
        MarkupLMSelfAttention="markuplm",
        LayoutLMSelfAttention="layoutlm",
        MBartAttention="mbart",
        M2M100Attention="m2m_100",
        PegasusAttention="pegasus",
        PLBartAttention="plbart",
        MarianAttention="marian",
        BlenderbotAttention="blenderbot",
        BlenderbotSmallAttention="blenderbot_small",
        BigBirdPegasusDecoderAttention="bigbird_pegasus",
        BioGptAttention="biogpt",
        Sam3TrackerAttention="sam3_tracker",
        Sam3TrackerVideoAttention="sam3_tracker_video",
        Sam2VideoAttention="sam2_video",
        Sam3LiteTextTextAttention="sam3_lite_text",
        Kosmos2VisionAttention="kosmos2",
        KosmosTextAttention="kosmos2",
        Molmo2VisionAttention="molmo2",
        Phi4MultimodalVisionAttention="phi4_multimodal",
        HYV4VLVisionAttention="hy_v4_vl",
        MiniCPMOcrVisionAttention="minicpm_ocr",
        MiniCPMV4_7VisionAttention="minicpmv4_7",
        UnlimitedOcrAttention="unlimited_ocr",
        GraniteDoclingVisionAttention="granite_docling",
        GlmImageVisionAttention="glm_image",
        PPFormulaNetAttention="pp_formulanet",
        AlignTextSelfAttention="align",
    ),
    **_rows(
        partial(Native, per_head=(("relative_position_bias.relative_position_bias_table", 1),)),
        SwinAttention="swin",
    ),
    **_rows(partial(Native, widths=("embed_dim",)), InternVLVisionAttention="internvl"),
    # the forward divides by sqrt(attention_head_size) and computes attention step by step;
    # vlprune's subclass uses a fused kernel
    **_rows(
        partial(Native, fold=True, swap="spelled"),
        BlipTextSelfAttention="blip_captioning",
        ViltSelfAttention="vilt",
        FlavaSelfAttention="flava",
    ),
    **_rows(
        partial(Native, fold=True),
        VisualBertSelfAttention="visual_bert",
        TvpAttention="tvp",
        OmDetTurboMultiheadAttention="omdet_turbo",
        GitSelfAttention="git",
        GLPNEfficientSelfAttention="glpn",
        PvtEfficientSelfAttention="pvt",
        MobileViTSelfAttention="mobilevit",
        SuperGlueSelfAttention="superglue",
        MegatronBertSelfAttention="megatron_bert",
        RemBertSelfAttention="rembert",
    ),
    **_rows(partial(Native, fold=True, widths=("head_size",)), LxmertAttention="lxmert"),
    # masks or position biases for all heads, from callers or a table, would not fit fewer
    **_rows(
        partial(Native, head=False),
        Swinv2SelfAttention="swinv2",
        Swin2SRSelfAttention="swin2sr",
        BeitAttention="beit_bias",
        EomtAttention="eomt",
        Sam3Attention="sam3",
        Sam3LiteTextAttention="sam3_lite_text",
        PPDocLayoutV2ReadingOrderSelfAttention="pp_doclayout_v2",
    ),
    **_rows(
        partial(Native, head=False, widths=("inner_dim",)),
        T5Attention="t5",
        UdopAttention="udop",
        Pix2StructVisionAttention="pix2struct",
        Pix2StructTextAttention="pix2struct",
    ),
    # the same, and a derived temperature
    **_rows(
        partial(Native, head=False, fold=True),
        Data2VecVisionSelfAttention="data2vec_vision_eager",
        Data2VecVisionSdpaSelfAttention="data2vec_vision",
        MPNetSelfAttention="mpnet",
        DonutSwinSelfAttention="donut_swin",
        MaskFormerSwinSelfAttention="maskformer_swin",
    ),
    # the same temperature, but callers build masks for all heads, which would broadcast
    **_rows(
        partial(Native, head=False, fold=True),
        GroundingDinoMultiheadAttention="grounding_dino",
        MMGroundingDinoMultiheadAttention="mm_grounding_dino",
    ),
    # rotary embeddings turn dimensions in pairs
    **_rows(
        partial(Native, rotary=True),
        LlamaAttention="llava",
        MistralAttention="idefics2",
        Qwen2Attention="internvl",
        Qwen3Attention="internvl_qwen3",
        Qwen2VLAttention="qwen2_vl",
        Qwen2_5_VLAttention="qwen2_5_vl",
        Qwen3VLTextAttention="qwen3_vl",
        GemmaAttention="paligemma",
        Gemma2Attention="paligemma2",
        Gemma3Attention="gemma3",
        VisionAttention="qwen2_vl",
        Qwen2_5_VLVisionAttention="qwen2_5_vl",
        Qwen3VLVisionAttention="qwen3_vl",
        DINOv3ViTAttention="dinov3",
        PixtralAttention="pixtral",
        Sapiens2Attention="sapiens2",
        MLCDAttention="mlcd_vision_model",
        AriaTextAttention="aria",
        Exaone4Attention="exaone4",
        MllamaTextSelfAttention="mllama",
        Glm4vVisionAttention="glm4v",
        GlmOcrVisionAttention="glm_ocr",
        Glm4vMoeVisionAttention="glm4v_moe",
        Qwen3_5VisionAttention="qwen3_5_vl",
        Qwen3VLMoeTextAttention="qwen3_vl_moe",
        Qwen3VLMoeVisionAttention="qwen3_vl_moe",
        CohereCompassAttention="cohere_compass",
        CohereCompassVisionAttention="cohere_compass",
        HyperCLOVAXAttention="hyperclovax_vision_v2",
        PaddleOCRAttention="paddleocr_vl",
        PaddleOCRVisionAttention="paddleocr_vl",
        VideoLlama3VisionAttention="video_llama_3",
        Kimi_K25VisionAttention="kimi_k25",
        Ernie4_5_VLMoeVisionAttention="ernie4_5_vl_moe",
        MuseGlimmerVisionAttention="muse_glimmer",
        Lfm3VlVisionAttention="lfm3_vl",
        Cosmos3EdgeTextAttention="cosmos3_edge",
        Qwen2_5OmniAttention="qwen2_5_omni_thinker",
        Qwen2_5OmniVisionAttention="qwen2_5_omni_thinker",
        Qwen3OmniMoeThinkerTextAttention="qwen3_omni_moe_thinker",
        Qwen3OmniMoeVisionAttention="qwen3_omni_moe_thinker",
        Step3p7VisionAttention="step3p7",
        UltrabertAttention="ultravbert",
        EuroBertAttention="eurobert",
        Starcoder2Attention="starcoder2",
        OlmoAttention="olmo",
        GraniteAttention="granite",
        SmolLM3Attention="smollm3",
        MinistralAttention="ministral",
        Ministral3Attention="ministral3",
        ArceeAttention="arcee",
        SeedOssAttention="seed_oss",
        ApertusAttention="apertus",
        CwmAttention="cwm",
        VaultGemmaAttention="vaultgemma",
        Glm4vTextAttention="glm4v",
        GlmOcrTextAttention="glm_ocr",
        Ernie4_5_VLMoeTextAttention="ernie4_5_vl_moe",
        LightGlueAttention="lightglue",
        Cohere2Attention="cohere2",
        Lfm2Attention="lfm2",
        HunYuanVLDenseV1Attention="hunyuan_vl",
        CohereAttention="cohere",
        HeliumAttention="helium",
        Ernie4_5Attention="ernie4_5",
        HunYuanDenseV1Attention="hunyuan_v1_dense",
        MixtralAttention="mixtral",
        Qwen2MoeAttention="qwen2_moe",
        Qwen3MoeAttention="qwen3_moe",
        PhimoeAttention="phimoe",
        GraniteMoeSharedAttention="granitemoe",
        Sam3ViTRoPEAttention="sam3",
        Sam2VideoRoPEAttention="sam2_video",
        Sam3TrackerVideoRoPEAttention="sam3_tracker_video",
        Emu3Attention="emu3",
        DeepseekOcr2VisionAttention="deepseek_ocr2",
        DeepseekOcr2TextAttention="deepseek_ocr2",
        Molmo2Attention="molmo2",
        T5Gemma2SelfAttention="t5gemma2",
        T5Gemma2MergedAttention="t5gemma2",
        Granite4VisionTextAttention="granite4_vision",
        GraniteDoclingTextAttention="granite_docling",
        Dots3NoteVisionAttention="dots3_note",
        Glm5NextVisionAttention="glm5_next",
        Qwen4ExpVisionAttention="qwen4_exp",
        Inkling2VisionAttention="inkling2",
        MuseSparkVisionAttention="muse_spark",
        UnlimitedOcrTextAttention="unlimited_ocr",
        GlmImageTextAttention="glm_image",
        Apertus1p5TextAttention="apertus1p5",
        GlmAttention="glm",
        Glm4Attention="glm4",
        NemotronAttention="nemotron",
        Glm4vMoeTextAttention="glm4v_moe",
        GPTNeoXAttention="gpt_neox",
        PhiAttention="phi",
    ),
    # the same, but the forward takes its queries apart by the number of heads in its config
    **_rows(
        partial(Native, head=False, rotary=True),
        Phi3Attention="phi3",
        Phi4MultimodalAttention="phi4_multimodal",
    ),
    # the size of a head is under names of its own, scaled dimension by dimension, or divides the
    # scores, where queries cannot be scaled without the keys and values of the same parameter
    **_rows(
        partial(Native, head_dim=False),
        PerceiverSelfAttention="perceiver",
        VideoPrismMultiheadAttentionPoolingHead="videoprism",
        EmbeddingGemma2Attention="embedding_gemma2",
        ImageGPTAttention="imagegpt",
    ),
    # rotary embeddings that turn a part of a head, have angles of their own, or keep them inside
    **_rows(
        partial(Native, head_dim=False),
        BrosSelfAttention="bros",
        VJEPA2RopeAttention="vjepa2",
        MllamaTextCrossAttention="mllama",
        IdeficsAttention="idefics",
        Qwen3_5Attention="qwen3_5_vl",
        MiniMaxM3VLVisionAttention="minimax_m3_vl",
        Gemma4VisionAttention="gemma4",
        ModernBertAttention="modernbert",  # its temperature would fold into a part of its rows
        RoFormerSelfAttention="roformer",
        Llama4TextAttention="llama4",
    ),
    # relative positions are as long as a head, and the same for all heads
    **_rows(
        partial(Native, head_dim=False),
        SegGptAttention="seggpt",
        SamVisionAttention="sam_eager",
        SamVisionSdpaAttention="sam",
        SamHQVisionAttention="sam_hq_eager",
        SamHQVisionSdpaAttention="sam_hq",
        GotOcr2VisionAttention="got_ocr2",
        DeepseekOcr2SamVisionSdpaAttention="deepseek_ocr2",
        UnlimitedOcrSamVisionSdpaAttention="unlimited_ocr",
        SLANeXtVisionAttention="slanext",
        PPFormulaNetVisionAttention="pp_formulanet",
    ),
    # latent attention: the forward splits by the numbers of its module, and keeps its own scale
    **_rows(
        partial(Native, qk_vo=True),
        DeepseekV3Attention="deepseek_v3",
        Glm4MoeLiteAttention="glm4_moe_lite",
        Mistral4Attention="mistral4",
        MiniCPM3Attention="minicpm3",
        DeepseekV32Attention="deepseek_v32",
        GlmMoeDsaAttention="glm_moe_dsa",
        YoutuAttention="youtu",
    ),
    # the same, with a scale of its own for every head
    **_rows(partial(Native, head=False, qk_vo=True), MistralLarge4TextAttention="mistral_large4"),
    # the same, but what is rotated must begin at an even place
    **_rows(partial(Native, head_dim=False), DeepseekV2Attention="deepseek_v2"),
    # the forward fixes its shapes: vlprune's subclass takes them from its head sizes
    **_rows(
        partial(Native, qk_vo=True, swap="fused"),
        BlipAttention="blip",
        Blip2Attention="blip2",
        InstructBlipAttention="instructblip",
    ),
    **_rows(partial(Native, qk_vo=True, swap="multihead"), MultiheadAttention="siglip"),
}

# Fused projections whose rows are [q | k | v], though no shape in their source says so.
FUSED_ORDER_KNOWN = frozenset(["GPT2Attention", "ImageGPTAttention"])

# Blocks that are not what a row of the table says, whether they match one or not.
DENSE = {
    "Florence2VisionChannelAttention": "attends over channels, not over tokens",
    "ConditionalDetrDecoderSelfAttention": "its queries and keys are sums of two projections",
    "ConditionalDetrDecoderCrossAttention": "its heads join projections of content and of position",
    "DabDetrDecoderLayerSelfAttention": "its queries and keys are sums of two projections",
    "DabDetrAttention": "its queries, keys and values come from projections of its layer",
    "DabDetrDecoderLayerCrossAttention": "its heads join projections of content and of position",
    "Sam3DecoderMLP": "a head that reads off boxes or scores, not the FFN of a layer",
    "Sam3LiteTextDecoderMLP": "a head that reads off boxes or scores, not the FFN of a layer",
    "NeoMMEAttention": "embeddings of the words are added to its values",
    "MLPLayerWithBN": "a batch norm of its outputs follows it",
    "FocalNetModulation": "mixes tokens by convolutions, without heads",
    "SwiftFormerEfficientAdditiveAttention": "adds tokens up, without heads",
    "GroupViTAssignAttention": "gives each token to one group, without heads",
}

# Parts whose attention reads the keys and values of one another's layers from one cache, by the
# class that joins them: in a cut, the heads of all stay as large and as many as they are.
ONE_CACHE = {"PI0Model": ("dit", "vlm.language_model")}

# Classes that use the scores of a head elsewhere too, or the mean over all heads, so that its
# queries and keys count as well.
SCORES_LEAVE = frozenset(["LiltSelfAttention", "AutoformerAttention"])

# Classes whose forward ties what a unit would take apart: these units, and why.
TIED = {
    "ClvpSelfAttention": (
        ("head_dim", "qk_vo"),
        "a rotary embedding turns its values as well, which joins their dimensions: take head",
    ),
    "DiffLlamaAttention": (
        ("head", "query_head"),
        "each head is subtracted from another one, whose values it shares: take head_dim",
    ),
}

# Projections beside those of a row, by name.
DENSE_CHILDREN = {
    "sampling_offsets": "deformable attention: where each head looks, and every head stays",
    "attention_weights": "deformable attention: how much each place counts, and every head stays",
    "temporal_dense": "between the two attentions of a layer, as wide as the residual stream",
    "per_layer_input_gate": "reads the residual stream into the embedding of its layer",
    "per_layer_projection": "reads the embedding of its layer into the residual stream",
    "q_a_proj": "a latent that passes through a norm, which mixes all of its dimensions",
    "kv_a_proj_with_mqa": "a latent that passes through a norm, which mixes all of its dimensions",
}
