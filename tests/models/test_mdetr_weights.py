"""MDETR's published checkpoints: their names and sizes, and what they must compute."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

from alike import same_model
from vlprune.data.shapes.write import write_shapes
from vlprune.errors import CheckpointError
from vlprune.models import MdetrConfig, MdetrForGrounding
from vlprune.models.mdetr_weights import convert_mdetr, published_settings
from vlprune.recipe.spec import DataSpec, ModelSpec
from vlprune.tasks import GqaTask
from vlprune.tasks.gqa import ANSWER_TYPES

KINDS = ("type", "obj", "rel", "attr", "cat", "global")


def published(model: Any, heads: int) -> dict[str, Tensor]:
    """The model's weights under the names, and with the fused shapes, of the authors' files."""
    own, state = model.state_dict(), {}
    for name, value in own.items():
        attention = re.match(
            r"(fusion_encoder|decoder)\.layers\.(\d+)\.(self|encoder)_attn\.", name
        )
        if attention:
            part, number, which = attention.groups()
            block = "self_attn" if which == "self" else "cross_attn_image"
            path = (
                f"transformer.{'encoder' if part != 'decoder' else part}.layers.{number}.{block}."
            )
            leaf = name[attention.end() :]
            if leaf.startswith("o_proj"):
                state[path + leaf.replace("o_proj", "out_proj")] = value
            elif leaf.startswith("q_proj"):
                kind = leaf.rpartition(".")[2]
                rows = [own[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                state[f"{path}in_proj_{kind}"] = torch.cat(rows)
            continue
        encoder, decoder = r"fusion_encoder\.layers\.(\d+)", r"decoder\.layers\.(\d+)"
        there = {p: rf"transformer.{p}.layers.\1" for p in ("encoder", "decoder")}
        for pattern, new in (
            (r"vision_model\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
            (r"vision_model\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
            (rf"{encoder}\.mlp\.fc", f"{there['encoder']}.linear"),
            (rf"{encoder}\.self_attn_layer_norm", f"{there['encoder']}.norm1"),
            (rf"{encoder}\.final_layer_norm", f"{there['encoder']}.norm2"),
            (rf"{decoder}\.mlp\.fc", f"{there['decoder']}.linear"),
            (rf"{decoder}\.self_attn_layer_norm", f"{there['decoder']}.norm1"),
            (rf"{decoder}\.encoder_attn_layer_norm", f"{there['decoder']}.norm3"),
            (rf"{decoder}\.final_layer_norm", f"{there['decoder']}.norm4"),
            (r"decoder\.layernorm", "transformer.decoder.norm"),
            (r"text_encoder", "transformer.text_encoder"),
            (r"resizer", "transformer.resizer"),
            (r"align_queries", "contrastive_align_projection_image"),
            (r"align_text", "contrastive_align_projection_text"),
        ):
            name = re.sub(f"^{pattern}", new, name)
        bottleneck = re.match(r"vision_model\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.", name)
        if bottleneck:
            rest = name[bottleneck.end() :]
            rest = rest.replace("shortcut.convolution", "downsample.0")
            rest = rest.replace("shortcut.normalization", "downsample.1")
            rest = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", rest)
            rest = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", rest)
            name = f"backbone.0.body.layer{int(bottleneck[1]) + 1}.{bottleneck[2]}.{rest}"
        answer = re.match(r"answer_heads\.(answer_\w+)\.", name)
        if answer:
            name = f"{answer[1]}_head.{name[answer.end() :]}"
        if name == "answer_queries.weight":
            kinds = ("type", "obj", "rel", "attr", "cat", "global")
            order = [sorted(kinds).index(kind) for kind in kinds]
            name, value = "qa_embed.weight", value[order]
        state[name] = value
    state["transformer.text_encoder.pooler.dense.weight"] = torch.zeros(2, 2)
    state["transformer.text_encoder.embeddings.position_ids"] = torch.zeros(1, 4)
    return state


def small(**answers: Any) -> Any:
    """A model of small sizes that the shapes of its weights tell, as those of published ones do."""
    torch.manual_seed(0)
    resnet = T.ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64], depths=[2, 1], out_features=["stage2"]
    )
    text = T.RobertaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=40,
        vocab_size=64, max_position_embeddings=16, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 20}
    config = MdetrConfig(
        backbone_config=resnet, text_config=text, **sizes, decoder_ffn_dim=28, num_queries=3,
        text_positions=12, alignment_size=8, **answers,
    )  # fmt: skip
    return MdetrForGrounding(config).eval()


def answering(**numbers: int) -> dict[str, int]:
    return {f"answer_{kind}": numbers.get(kind, 3) for kind in KINDS}


INPUTS = {
    "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    "input_ids": torch.tensor([[0, 5, 6, 7, 8, 2], [0, 9, 6, 2, 1, 1]]),
    "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]]),
}


def test_a_checkpoint_with_the_authors_names_is_converted() -> None:
    model = small(answer_heads=answering(), answer_layer="first", answer_types=ANSWER_TYPES)
    state = published(model, 4)
    assert "transformer.decoder.layers.1.cross_attn_image.in_proj_weight" in state
    assert state["transformer.decoder.layers.1.cross_attn_image.in_proj_weight"].shape == (48, 16)
    assert "backbone.0.body.layer1.0.downsample.0.weight" in state
    torch.manual_seed(1)
    fresh: Any = MdetrForGrounding(MdetrConfig(**published_settings(state))).eval()
    fresh.load_state_dict(convert_mdetr(state, fresh.config))
    same_model(model, fresh, INPUTS)
    with pytest.raises(CheckpointError, match="no weight of an MDETR"):
        convert_mdetr({"blip.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"lacks 'transformer\.text_enc.* another model's"):
        published_settings({"blip.weight": torch.zeros(1)})


def test_a_resnet_101_has_its_sizes() -> None:
    """Those that the authors' code writes out, read from shapes alone."""
    resnet = T.ResNetConfig(depths=[3, 4, 23, 3], out_features=["stage4"])
    text = T.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        model = MdetrForGrounding(MdetrConfig(backbone_config=resnet, text_config=text))
        state = published(model, 8)
        found: Any = MdetrForGrounding(MdetrConfig(**published_settings(state)))
    assert found.load_state_dict(convert_mdetr(state), assign=True)
    for name in ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "num_queries"):
        assert getattr(found.config, name) == getattr(model.config, name), name
    assert found.config.backbone_config.depths == [3, 4, 23, 3]
    assert found.config.text_config.num_attention_heads == 12
    assert (found.config.answer_layer, found.config.answer_heads) == ("last", {})


def test_a_published_gqa_checkpoint_says_its_settings() -> None:
    sizes = {"type": 5, "obj": 3, "rel": 1594, "attr": 403, "cat": 678, "global": 111}
    found = published_settings(published(small(answer_heads=answering(**sizes)), 8))
    assert {name: value for name, value in found.items() if name.startswith("answer")} == {
        "answer_heads": answering(**sizes),
        "answer_layer": "first",
        "answer_types": ["obj", "attr", "rel", "global", "cat"],
    }
    # the rows of the six queries: type, obj, rel, attr, cat, global there, sorted by name here
    queries = torch.arange(6.0)[:, None]
    moved = convert_mdetr({"qa_embed.weight": queries})["answer_queries.weight"]
    assert moved[:, 0].tolist() == [3, 4, 5, 1, 2, 0]  # attr, cat, global, obj, rel, type


def test_answer_heads_written_by_hand_read_the_authors_layer() -> None:
    """A config that names the heads only: the converter sets what it forgot, or refuses."""
    state = published(small(answer_heads=answering()), 8)
    by_hand: Any = small(answer_heads=answering())
    assert (by_hand.config.answer_layer, by_hand.config.answer_types) == ("last", None)
    with pytest.raises(CheckpointError, match=r"give the config .* convert_mdetr\(state, model"):
        convert_mdetr(state)
    wrong: Any = small(answer_heads=answering(rel=7))
    with pytest.raises(CheckpointError, match=r"'answer_rel': 3.* the config .*'answer_rel': 7"):
        convert_mdetr(state, wrong.config)
    assert wrong.config.answer_layer == "last"
    by_hand.load_state_dict(convert_mdetr(state, by_hand.config))
    asked: Any = MdetrForGrounding(MdetrConfig(**published_settings(state))).eval()
    asked.load_state_dict(convert_mdetr(state, asked.config))
    assert list(by_hand.config.answer_types) == list(ANSWER_TYPES)
    answers, wanted = by_hand(**INPUTS).answers, asked(**INPUTS).answers
    for name, logits in wanted.items():
        torch.testing.assert_close(answers[name], logits)
    by_hand.config.answer_layer = "last"
    assert not torch.allclose(by_hand(**INPUTS).answers["answer_rel"], wanted["answer_rel"])


def test_a_checkpoint_with_a_cls_token_is_refused() -> None:
    with pytest.raises(CheckpointError, match="also reads a CLS token"):
        convert_mdetr({"transformer.CLS.weight": torch.zeros(1, 16)})


def test_the_documented_conversion_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (code,) = (code for code in codes if "convert_mdetr" in code)
    scenes = write_shapes(tmp_path / "scenes", train=8, test=4)
    data = DataSpec(folder=str(scenes), train_items=8, test_items=4)
    maker = GqaTask(ModelSpec(width=32, heads=4, image_size=32, patch_size=16), data, scenes, {})
    model = small(answer_heads=maker.heads)
    body = {"model": published(model, 8), "epoch": 4, "args": argparse.Namespace(lr=1e-4)}
    torch.save(body, tmp_path / "gqa_resnet101_checkpoint.pth")
    maker.processor.tokenizer.save_pretrained(tmp_path / "roberta-base")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    saved: Any = MdetrForGrounding.from_pretrained(tmp_path / "mdetr-gqa")
    for name, tensor in saved.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name
    assert saved.config.answer_layer == "first"
    task = GqaTask(ModelSpec(path=str(tmp_path / "mdetr-gqa")), data, scenes, {})
    assert min(task.looks(task.test[:1])["pixel_values"].shape[-2:]) == 800
    assert task.load(tmp_path / "mdetr-gqa").config.answer_layer == "first"
    assert task.kinds == ANSWER_TYPES
