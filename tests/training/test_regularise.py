"""Drop path and dropout for one training: what they drop, when, and that nothing of them stays."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
from small_runs import DEMO, TINY
from vlprune.architectures import discover
from vlprune.commands.pipeline.compress import compress
from vlprune.cutting.gates import gated
from vlprune.errors import RecipeError, UnsupportedError
from vlprune.recipe.spec import load_recipe
from vlprune.structures.plan import Plan
from vlprune.testing import build
from vlprune.training import regularise
from vlprune.training.objective import Trainee
from vlprune.training.regularise import DropPath, regularised


def inside(model: Any, drop_path: dict[str, float], dropout: dict[str, float] | None = None) -> Any:
    structures = discover(model).structures
    return regularised(Trainee(model), model, structures, drop_path, dropout or {})


def output(model: Any, inputs: Any) -> Tensor:
    found = model(**inputs)
    return found.logits if "logits" in found else found[0]  # type: ignore[no-any-return]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


# -- drop path -----------------------------------------------------------------------------


def test_a_branch_is_dropped_for_a_whole_sample_and_keeps_its_mean() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 4).train()
    linear.register_forward_hook(DropPath(0.25))
    given = torch.randn(4000, 5, 3)
    plain = nn.functional.linear(given, linear.weight, linear.bias)
    found = linear(given)
    dropped = (found == 0).flatten(1).all(1)
    assert bool(((found == 0).flatten(1).any(1) == dropped).all())
    assert 0.22 < float(dropped.float().mean()) < 0.28
    kept = plain[~dropped] / 0.75
    assert torch.allclose(found[~dropped], kept, atol=1e-6)
    linear.eval()
    assert torch.equal(linear(given), plain)


def test_processes_of_one_seed_drop_different_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    given, seen = torch.ones(64, 1, 1), []
    for rank in (0, 1):
        monkeypatch.setattr(regularise, "world", lambda rank=rank: (2, rank))
        torch.manual_seed(0)
        seen.append(DropPath(0.5)(nn.Linear(1, 1), (), given))
        after = torch.rand(1)
    assert not torch.equal(seen[0], seen[1])
    torch.manual_seed(0)
    DropPath(0.5)(nn.Linear(1, 1), (), given)
    assert torch.equal(torch.rand(1), after)  # and go on alike


def test_the_rate_rises_from_0_in_the_first_layer_as_in_timm() -> None:
    """Four layers at 0.3: 0, 0.1, 0.2, 0.3, for attention and FFN alike."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2,
                       intermediate_size=8, image_size=8, patch_size=4)  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    with inside(model, {"layers.*": 0.3}):
        rates = {
            name: hook.rate
            for name, module in model.named_modules()
            for hook in module._forward_hooks.values()
        }
    wanted = {f"layers.{n}.{end}": 0.1 * n for n in (1, 2, 3)
              for end in ("attention.o_proj", "mlp.fc2")}  # fmt: skip
    assert rates == pytest.approx(wanted)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("family", "pattern"),
    [("blip_nlvr", "vision_model.*"), ("deit", "*"), ("segmenter", "vit.*"), ("clip", "vision_*")],
)
def test_a_dropped_layer_is_left_out(family: str, pattern: str) -> None:
    """At a rate of nearly 1 the branches of the last layer are gone: the states pass as they are.

    A hook on the last layer sees that; the evaluation of the model is the same to the bit.
    """
    sample = build(family)
    model, inputs = sample.model, sample.inputs
    before = output(model, inputs)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: Any, given: Any, found: Any) -> None:
        seen.append((given[0].detach(), (found[0] if isinstance(found, tuple) else found).detach()))

    last = [s for s in discover(model) if s.tower == "vision"][-1].name.rsplit(".mlp", 1)[0]
    handle = model.get_submodule(last).register_forward_hook(note)
    start = hooks(model)
    with inside(model, {pattern: 0.999999}):
        assert torch.equal(output(model, inputs), before)
        model.train()
        torch.manual_seed(0)
        output(model, inputs)
    given, found = seen[-1]
    assert torch.equal(given, found)
    assert hooks(model) == start
    handle.remove()
    model.eval()
    assert torch.equal(output(model, inputs), before)


def test_drop_path_and_gates_act_together_and_reach_their_gradients() -> None:
    """The gates' gradients of a step are those of the samples whose branches stay."""
    sample = build("deit")
    model = sample.model.train()
    structures = discover(model).structures
    gates = {s.name: torch.ones(s.size, requires_grad=True) for s in structures}
    with gated(model, structures, gates), inside(model, {"*": 0.999999}):
        torch.manual_seed(0)
        output(model, sample.inputs).square().mean().backward()
    last = [s.name for s in structures][-2:]
    assert all(bool((gates[name].grad == 0).all()) for name in last)
    assert any(bool((gates[s.name].grad != 0).any()) for s in structures)


def test_recomputed_layers_drop_the_same_samples() -> None:
    """With gradient checkpointing a layer runs twice, and must drop the same the second time."""
    grads = []
    for recompute in (False, True):
        sample = build("blip_nlvr")
        model: Any = sample.model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with inside(model, {"vision_model.*": 0.5}):
            torch.manual_seed(1)
            output(model, sample.inputs).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_and_pickles_drop_nothing() -> None:
    sample = build("deit")
    model = sample.model
    with inside(model, {"*": 0.9}):
        copied = copy.deepcopy(model).train()
        loaded = pickle.loads(pickle.dumps(model)).train()
    model.eval()
    for one in (copied, loaded):
        assert torch.allclose(output(one, sample.inputs), output(model, sample.inputs), atol=1e-6)


def test_a_drop_path_of_the_models_own_is_used() -> None:
    """BEiT has an Identity where its rate is 0, and a module with ``drop_prob`` elsewhere."""
    from transformers import BeitConfig, BeitModel

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8}
    model = BeitModel(BeitConfig(**sizes, num_hidden_layers=3, patch_size=4, drop_path_rate=0.2))
    own = {n: m.drop_prob for n, m in model.named_modules() if hasattr(m, "drop_prob")}
    assert own
    with inside(model, {"*": 0.4}):
        now = {n: m.drop_prob for n, m in model.named_modules() if hasattr(m, "drop_prob")}
        assert hooks(model) == 0
    assert sorted(set(now.values())) == pytest.approx([0.2, 0.4])
    again = {n: m.drop_prob for n, m in model.named_modules() if hasattr(m, "drop_prob")}
    assert again == own
    swin = build("swin").model  # its attention computes on windows, which are no samples
    with inside(swin, {"*": 0.4}):
        now = {n: m.drop_prob for n, m in swin.named_modules() if hasattr(m, "drop_prob")}
        assert hooks(swin) == 0
    assert max(now.values()) == 0.4


def test_a_single_layer_gets_the_whole_rate_and_the_last_pattern_decides() -> None:
    model = build("deit").model
    last = max(number for number, _ in enumerate(model.deit.layers))
    rates = {f"deit.layers.{last}.*": 0.5}
    for patterns in (rates, {"*": 0.2, **rates}):
        with inside(model, patterns):
            found = [
                hook.rate
                for name, module in model.named_modules()
                if f"layers.{last}." in name
                for hook in module._forward_hooks.values()
            ]
        assert found == [0.5, 0.5]


def test_what_cannot_be_reached_is_refused() -> None:
    model = build("deit").model
    with pytest.raises(RecipeError, match=r"no attention or FFN branch matches 'text.*'"):
        inside(model, {"text.*": 0.1}).__enter__()
    assert hooks(model) == 0
    pooled = build("siglip").model  # the head of its vision tower is an nn.MultiheadAttention
    with pytest.raises(UnsupportedError, match="computes its projection by itself"):
        inside(pooled, {"vision_model.*": 0.1}).__enter__()
    assert hooks(pooled) == 0
    with inside(pooled, {"vision_model.encoder.*": 0.1}):
        assert hooks(pooled) > 0
    packed = build("qwen2_vl")
    with (
        inside(packed.model.train(), {"visual.*": 0.5, "*.visual.*": 0.5}),
        pytest.raises(UnsupportedError, match="all samples or tokens as rows"),
    ):
        packed.model(**packed.inputs)
    assert hooks(packed.model) == 0


# -- dropout -------------------------------------------------------------------------------


def test_dropout_of_the_text_tower_for_one_training(tmp_path: Path) -> None:
    """All places where BERT drops: the embeddings, attention, and the end of each branch."""
    sample = build("blip_vqa")
    model: Any = sample.model
    config = model.config.text_config.to_dict()
    before = output(model, sample.inputs)
    rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert not any(rates.values())
    with inside(model, {}, {"text_encoder.*": 0.1, "text_decoder.*": 0.2}):
        now = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
        assert torch.equal(output(model, sample.inputs), before)
        model.train()
        assert not torch.equal(output(model, sample.inputs), before)
        model.eval()
        vlprune.save(model, tmp_path)
    for name, rate in now.items():
        assert (
            rate
            == {"vis": 0.0, "text_e": 0.1, "text_d": 0.2}[
                next(one for one in ("vis", "text_e", "text_d") if name.startswith(one))
            ]
        )
    kinds = {name.rpartition(".layer.")[2] for name in now if name.startswith("text_encoder.")}
    assert {"text_encoder.embeddings.dropout", "0.attention.self.dropout",
            "0.attention.output.dropout", "0.crossattention.self.dropout",
            "0.output.dropout"} <= kinds  # fmt: skip
    assert {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)} == rates
    assert model.config.text_config.to_dict() == config
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(m.p for m in loaded.modules() if isinstance(m, nn.Dropout))


def test_attention_that_has_its_dropout_as_a_number_drops_too() -> None:
    """ViT, in Segmenter's decoder: a number for attention, and a module after each branch."""
    model: Any = build("segmenter").model
    layer = model.decoder.layers[0]
    with inside(model, {}, {"decoder.*": 0.1}):
        assert layer.attention.attention_dropout == 0.1
        assert layer.dropout.p == 0.1
        assert model.vit.layers[0].attention.attention_dropout == 0.0
    assert layer.attention.attention_dropout == 0.0
    assert layer.dropout.p == 0.0
    detr: Any = build("detr").model
    with inside(detr, {}, {"*": 0.3}):
        found = [m for m in detr.modules() if hasattr(m, "activation_dropout")]
        assert {m.activation_dropout for m in found} == {0.3}
    with pytest.raises(RecipeError, match=r"nothing that matches 'head.*' has dropout"):
        inside(model, {}, {"head.*": 0.1}).__enter__()


# -- a cut model -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deit", "blip_nlvr"])
def test_a_cut_model_is_regularised_like_a_whole_one(family: str) -> None:
    for unit in ("head_dim", "qk_vo"):
        sample = build(family)
        description = discover(sample.model, unit)  # type: ignore[arg-type]
        with regularised(sample.model, sample.model, description.structures, {"*": 0.5}, {}):
            dense = {name for name, module in sample.model.named_modules() if hooks(module)}
        keep = {s.name: tuple(range(0, s.size, 2)) for s in description}
        small = vlprune.rewrite(sample.model, description, Plan(keep=keep, attention=unit))
        with regularised(small, small, description.structures, {"*": 0.5}, {}):
            assert {name for name, module in small.named_modules() if hooks(module)} == dense
            assert bool(output(small.train(), sample.inputs).isfinite().all())
        assert hooks(small) == 0


def test_patterns_that_match_nothing_are_said_at_once(tmp_path: Path) -> None:
    wrong = ["train.drop_path={'no.*': 0.1, '*.nor': 0.2}", "search.dropout={'this.*': 0.1}"]
    with pytest.raises(RecipeError) as told:
        compress(load_recipe(DEMO, [*TINY, *wrong]), tmp_path / "out")
    assert [line.partition(":")[0] for line in told.value.problems] == [
        "train.drop_path",
        "train.drop_path",
        "search.dropout",
    ]


@pytest.mark.parametrize("wrong", ["drop_path", "dropout"])
def test_a_pattern_that_matches_nothing_is_refused_before_anything_trains(
    wrong: str, tmp_path: Path
) -> None:
    recipe = load_recipe(DEMO, [*TINY, f"retrain.{wrong}={{'nothing.*': 0.1}}"])
    with pytest.raises(RecipeError, match=rf"^retrain\.{wrong}: .* 'nothing\.\*'"):
        compress(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "dense").exists()
