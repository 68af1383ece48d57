"""Text encoders and decoders that vision-language models are put together from, one row each.

Variants, as in :mod:`vlprune.testing.variants`; what a row means is in :mod:`vlprune.testing.tiny`.
"""

from __future__ import annotations

from typing import Any

import torch

from .families import _ids, _pixels
from .tiny import texts


def seen(width: int = 24) -> dict[str, Any]:
    """What an image encoder gives, for cross-attention."""
    return {"encoder_hidden_states": _pixels(2, 4, width)}


ENCODERS = "splinter markuplm layoutlm lilt mpnet eurobert roformer"
for name in ENCODERS.split():
    texts(name)

READERS = (
    "camembert electra ernie data2vec-text roberta-prelayernorm xlm-roberta-xl rembert "
    "bert-generation"
)
for name in READERS.split():  # encoders' classes as decoders that read an image encoder's states
    texts(
        name.replace("-", "_"),
        kind=name,
        head="AutoModelForCausalLM",
        is_decoder=True,
        add_cross_attention=True,
        also=seen,
    )
texts("roc_bert", pronunciation_vocab_size=64, shape_vocab_size=64)
texts("megatron_bert", kind="megatron-bert")
texts(
    "modernbert_decoder",
    kind="modernbert-decoder",
    head="AutoModelForCausalLM",
    generates=True,
    cls_token_id=1,
    sep_token_id=2,
)
texts("nomic_bert")
texts(
    "deberta_v2",
    kind="deberta-v2",
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
)


def seen_by_all() -> dict[str, Any]:
    """The first token reads all others and is read by them, by projections of its own."""
    return {"global_attention_mask": torch.eye(6, dtype=torch.long)[:1].repeat(2, 1)}


texts("longformer", attention_window=[4, 4], also=seen_by_all)
texts(
    "trocr",
    head="AutoModelForCausalLM",
    is_decoder=True,
    add_cross_attention=True,
    cross_attention_hidden_size=32,
    also=lambda: seen(32),
)

TRANSLATORS = "mbart m2m_100 pegasus plbart marian blenderbot blenderbot-small bigbird_pegasus mvp"
for name in TRANSLATORS.split():
    texts(
        name.replace("-", "_"),
        kind=name,
        head="AutoModelForSeq2SeqLM",
        also=lambda: {"decoder_input_ids": _ids(4)},
    )

DECODERS = (
    "biogpt starcoder2 cohere cohere2 olmo olmo2 olmo3 granite glm glm4 helium smollm3 "
    "ministral ministral3 nemotron arcee exaone4 ernie4_5 seed_oss hunyuan_v1_dense apertus cwm "
    "vaultgemma phi"
)
for name in DECODERS.split():
    texts(name, head="AutoModelForCausalLM", generates=True)
texts("gpt_neox", head="AutoModelForCausalLM", generates=True, hidden_size=96)  # 3 pairs a head
