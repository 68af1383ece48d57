"""What the proof of a cut refuses, and what is left of a cut that was ended early: nothing."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import vlprune
from vlprune.cutting import apply as surgery
from vlprune.cutting import proof
from vlprune.cutting import rewrite as cutting
from vlprune.cutting.difference import difference, tensors_of
from vlprune.cutting.gates import has_gates
from vlprune.cutting.sharing import ties
from vlprune.cutting.widened import widened
from vlprune.errors import IncomparableError, PlanError, VerificationError
from vlprune.structures import record
from vlprune.structures.plan import Plan
from vlprune.testing import build
from vlprune.testing.conformance import make_plan

NAN, INF = float("nan"), float("inf")


def halved(model: nn.Module, attention: Any = "head", shared: bool = False) -> tuple[Any, Plan]:
    """A description, and a plan that keeps half of everything; the second FFN shares the first."""
    description = vlprune.discover(model, attention)
    keep = {s.name: tuple(range(max(1, s.size // 2))) for s in description}
    share: dict[str, Any] = {}
    if shared:
        source, target = [s for s in description if s.kind == "ffn" and s.tower == "vision"][:2]
        share = {target.name: (source.name, (0, 2), (1, 2))}
    return description, Plan(
        keep=keep, share=share, attention=attention, fingerprint=description.fingerprint
    )


# -- values that are no numbers ----------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["masked", "cut"])
def test_a_number_on_one_side_only_is_refused(value: float, side: str) -> None:
    good = [torch.arange(6.0).reshape(2, 3), torch.ones(2)]
    bad = [t.clone() for t in good]
    bad[1][1] = value
    pair = (bad, good) if side == "masked" else (good, bad)
    with pytest.raises(VerificationError, match="on one side only"):
        difference(*pair)


def test_infinities_of_opposite_sign_differ() -> None:
    with pytest.raises(VerificationError, match="sign"):
        difference([torch.tensor([1.0, INF])], [torch.tensor([1.0, -INF])])
    with pytest.raises(VerificationError, match="NaN where"):
        difference([torch.tensor([1.0, INF])], [torch.tensor([1.0, NAN])])
    both = torch.tensor([1.0, -INF, INF, NAN])
    assert difference([both], [both.clone()]).compared == 0.25


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("side", ["masked", "cut"])
def test_a_cut_that_makes_or_heals_nan_is_put_back(
    value: float, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = build("vit")
    before = {name: t.clone() for name, t in sample.model.state_dict().items()}
    real = proof._run

    def run(model: nn.Module, *args: Any) -> Any:
        outputs = real(model, *args)
        if side == ("masked" if has_gates(model) else "cut"):
            outputs[0][0, 0] = value
        return outputs

    monkeypatch.setattr(proof, "_run", run)
    with pytest.raises(VerificationError, match="one side only"):
        vlprune.rewrite(sample.model, *halved(sample.model), verify=sample.inputs)
    after = sample.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tower_that_is_all_nan_could_not_be_compared() -> None:
    sample = build("clip")
    with torch.no_grad():
        sample.model.vision_model.post_layernorm.weight.fill_(NAN)
    compressor = vlprune.Compressor(
        sample.model, vlprune.Magnitude(), {"params": 0.7}, example_inputs=sample.inputs
    )
    with pytest.raises(IncomparableError, match=r"finish\(verify=False\)"):
        compressor.finish()
    small = compressor.finish(verify=False)
    assert compressor.report()["verified"] is None
    assert sum(p.numel() for p in small.parameters()) <= 0.7 * compressor.params_before


@pytest.mark.parametrize("family", ["siglip", "llava", "blip"])
def test_a_millionth_in_one_weight_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = build(family)
    real = cutting.carry_out

    def apply(model: nn.Module, cut: Any, undo: Any) -> None:
        real(model, cut, undo)
        slot = next(s for s in cut.structures if s.kind == "ffn").slots[0]
        with torch.no_grad():
            model.get_parameter(slot.param).mul_(1 + 1e-6)

    monkeypatch.setattr(cutting, "carry_out", apply)
    with pytest.raises(VerificationError, match="masked and cut model differ by"):
        vlprune.rewrite(sample.model, *halved(sample.model), verify=sample.inputs)


# -- ended early -------------------------------------------------------------------------

STAGES = {
    "masked run": (cutting, "run_masked"),
    "swap": (surgery, "swap_forwards"),
    "narrow": (surgery, "narrow"),
    "pad": (surgery, "pad"),
    "follow": (surgery, "follow"),
    "untie": (cutting, "untie"),
    "tie": (surgery, "tie"),
    "tie one": (ties.parametrize, "register_parametrization"),
    "cut run": (cutting, "compare"),
    "record": (cutting, "write_record"),
    "config": (record, "_own_config"),
}


def snapshot(model: Any) -> dict[str, Any]:
    """All that a cut may touch, as plain values."""
    modules = dict(model.named_modules())
    return {
        "weights": {n: t.detach().clone() for n, t in model.state_dict().items()},
        "keys": list(model.state_dict()),
        "parameters": [(n, id(p), p.dtype, p.requires_grad) for n, p in model.named_parameters()],
        "classes": {n: type(m) for n, m in modules.items()},
        "training": {n: m.training for n, m in modules.items()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()
        },
        "plain": {
            n: {k: v for k, v in m.__dict__.items() if isinstance(v, int | float | str)}
            for n, m in modules.items()
        },
        "config": model.config.to_json_string(),
        "configs": {n: id(m.config) for n, m in modules.items() if hasattr(m, "config")},
        "order": {n: list(m._modules) + list(m._parameters) for n, m in modules.items()},
    }


def same(one: Any, other: Any) -> list[str]:
    """What differs between two snapshots."""
    wrong = [key for key in one if key != "weights" and one[key] != other[key]]
    for name, tensor in one["weights"].items():
        if name in other["weights"] and not torch.equal(tensor, other["weights"][name]):
            wrong.append(name)
    return wrong


def prepared(family: str) -> tuple[Any, Any, Any, Plan]:
    sample = build("clip" if family == "shared" else family)
    model: Any = sample.model
    if family == "shared":
        vlprune.rewrite(model, *halved(model, shared=True))
    modules = list(model.modules())
    model.train()
    modules[len(modules) // 2].training = False
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    return (model, sample.inputs, *halved(model))


@pytest.mark.parametrize("family", ["siglip", "llava", "blip", "shared"])
def test_ended_at_any_stage_the_model_is_as_it_was(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, description, plan = prepared(family)
    with torch.no_grad():
        model(**inputs)  # transformers' own hooks come with the first pass
    before, reached = snapshot(model), set()
    optimized = list(model.parameters())  # whoever has a parameter finds it in its place again
    endings = [KeyboardInterrupt, MemoryError, SystemExit]
    stages = [s for s in STAGES if family == "shared" or "tie" not in s]
    for number, (stage, when) in enumerate((s, w) for s in stages for w in ("before", "after")):
        proved = stage in ("masked run", "cut run") or number % 3 > 0
        error = endings[number // 2 % 3]
        with monkeypatch.context() as patch:
            place, name = STAGES[stage]
            patch.setattr(place, name, failing_once(getattr(place, name), when, error))
            with pytest.raises((error, IncomparableError), match="ended"):
                vlprune.rewrite(model, description, plan, verify=inputs if proved else None)
        assert not same(before, snapshot(model)), (stage, when, proved)
        reached.add((error, proved))
    assert len(reached) >= 5
    assert len(optimized) == len(before["parameters"])
    vlprune.rewrite(model, description, plan, verify=inputs)


@pytest.mark.parametrize("family", ["llava", "vilt"])
def test_a_parameter_that_nobody_else_has_is_put_together_again(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = build(family)
    model: Any = sample.model
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    with torch.no_grad():
        model(**sample.inputs)  # transformers' own hooks come with the first pass
    before = snapshot(model)
    alive = [weakref.ref(parameter) for parameter in model.parameters()]
    gone: list[int] = []

    def count(*_: Any) -> None:
        gone.append(sum(one() is None for one in alive))
        raise KeyboardInterrupt

    monkeypatch.setattr(cutting, "compare", count)
    with pytest.raises(KeyboardInterrupt):
        vlprune.rewrite(model, *halved(model, "head_dim"), verify=sample.inputs)
    assert gone[0] > 8  # what is cut is not held meanwhile
    after = snapshot(model)
    for one in (before, after):
        one["parameters"] = [facts[:1] + facts[2:] for facts in one["parameters"]]
    assert not same(before, after)


def failing_once(real: Callable[..., Any], when: str, error: type[BaseException]) -> Any:
    """``real``, which raises at its first call; what is undone afterwards may call it again."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            return real(*args, **kwargs)
        if when == "after":
            real(*args, **kwargs)
        raise error("ended")

    return call


# -- what the proof runs on --------------------------------------------------------------


def trained(model: Any, batches: Any, method: Any = None, **more: Any) -> vlprune.Compressor:
    """A finished search over the batches, each a tuple of positional arguments or keywords."""
    more.setdefault("attention", "head")
    compressor = vlprune.Compressor(model, method or vlprune.Taylor(), {"params": 0.75}, **more)
    with compressor:
        for number, batch in enumerate(batches):
            output = model(*batch) if isinstance(batch, tuple) else model(**batch)
            loss = output[0] if isinstance(output, tuple) else output.loss
            loss.backward()
            compressor.step((number + 1) / len(batches))
    compressor.finish()
    return compressor


def proof_of(compressor: vlprune.Compressor) -> Any:
    proof = compressor.verification
    assert proof is not None
    assert proof.difference < 1e-9
    assert proof.dtype == "float64"
    return proof


@pytest.mark.parametrize("family", ["detr", "grounding_dino"])
def test_nested_labels(family: str) -> None:
    sample = build(family)
    labels = [
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.2, 0.3]])}
        for _ in range(2)
    ]
    batch = {**sample.inputs, "labels": labels}
    proof = trained(sample.model, [batch] * 2).verification
    assert proof is not None
    # the loss of DETR has a float32 constant
    assert proof.dtype == "float64"  # DETR's loss holds float32 numbers: it is proved without
    assert proof.difference < 1e-9
    assert labels[0]["boxes"].dtype == torch.float32


class Rounding(nn.Module):
    """Computes a product in float32 by itself, and with a tensor of torch's default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.own.weight.to(torch.float32)
        turned = (x.float() @ weight.T).softmax(-1, dtype=torch.float32)
        return turned.type_as(x) @ torch.eye(64)


def test_a_forward_that_asks_for_float32_computes_in_float64() -> None:
    torch.manual_seed(0)
    module, x = Rounding().double(), torch.randn(4, 64, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="dtype"):
        module(x)
    with widened():
        found = module(x)
        assert torch.get_default_dtype() == torch.float64
    assert found.dtype == torch.float64
    exact = (x @ module.own.weight.T).softmax(-1)
    assert float((found - exact).abs().max()) < 1e-15
    assert torch.get_default_dtype() == torch.float32
    assert module.own.weight.to(torch.float32).dtype == torch.float32
    with pytest.raises(KeyError), widened():
        raise KeyError
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("family", ["llama4", "dab_detr"])
def test_what_a_forward_rounds_by_itself_is_no_difference(family: str) -> None:
    sample = build(family)
    description = vlprune.discover(sample.model, "head")
    plan = make_plan(description, lambda size: max(1, size // 2))
    small = vlprune.rewrite(sample.model, description, plan, verify=sample.inputs)
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    again = build(family)
    compressor = vlprune.Compressor(
        again.model, vlprune.Magnitude(), {"params": 0.9}, example_inputs=again.inputs
    )
    compressor.finish()
    proof = compressor.verification
    assert proof is not None
    assert proof.dtype == "float64"
    assert proof.difference < 1e-12


def test_a_look_at_generate_before_training_is_no_probe() -> None:
    sample = build("llava")
    model: Any = sample.model
    compressor = vlprune.Compressor(model, vlprune.Taylor(), {"params": 0.75}, attention="head")
    compressor.attach()
    model.generate(**sample.generate, max_new_tokens=2, do_sample=False)
    assert compressor._gating.first_batch is None
    model.train()
    with torch.no_grad():
        model(**sample.inputs)
    for step in range(2):
        model(**sample.inputs, labels=sample.inputs["input_ids"]).loss.backward()
        compressor.step((step + 1) / 2)
    compressor.finish()
    proof_of(compressor)


def test_a_probe_by_position_or_in_a_feature_class() -> None:
    sample = build("vit")
    pixels, labels = sample.inputs["pixel_values"], torch.tensor([1, 2])
    proof_of(trained(sample.model, [(pixels, labels)] * 2))
    sample = build("vit")
    feature = T.BatchFeature({"pixel_values": pixels, "labels": labels})
    proof_of(trained(sample.model, [feature] * 2))
    sample = build("bert")
    encoding = T.BatchEncoding({**sample.inputs, "labels": sample.inputs["input_ids"]})
    if "labels" in sample.model.forward.__code__.co_varnames:
        proof_of(trained(sample.model, [encoding] * 2))
    vlprune.rewrite(build("vit").model, *halved(build("vit").model), verify=feature)


class Session:
    """What a tracker is handed: pictures, and what it made of them so far."""

    def __init__(self, pictures: torch.Tensor) -> None:
        self.pictures, self.answer = pictures, None


class Tracker(T.ViTForImageClassification):
    """A model that answers from its session where it has seen the pictures before."""

    def forward(self, session: Session) -> Any:
        if session.answer is None:
            pictures = session.pictures.to(self.dtype)
            session.answer = super().forward(pictures).logits
        return session.answer


def test_a_session_that_remembers_does_not_answer_for_the_cut_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = build("vit")
    model = sample.model
    model.__class__ = Tracker
    session = Session(sample.inputs["pixel_values"])
    description, plan = halved(model)
    real = surgery.narrow

    def careless(model: Any, name: str, *args: Any) -> None:
        real(model, name, *args)
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)

    with monkeypatch.context() as broken:
        broken.setattr(surgery, "narrow", careless)
        with pytest.raises(VerificationError, match="differ"):
            cutting.rewrite(model, description, plan, {"session": session})
    assert session.answer is None
    cutting.rewrite(model, description, plan, {"session": session})


def test_what_was_fed_may_change_afterwards() -> None:
    """The first batch is a copy: a loop that reuses its buffers does not spoil the proof."""
    sample = build("vit")
    batch = {"pixel_values": sample.inputs["pixel_values"].clone(), "labels": torch.tensor([1, 2])}
    compressor = vlprune.Compressor(sample.model, vlprune.Taylor(), {"params": 0.75})
    with compressor:
        sample.model(**batch).loss.backward()
        compressor.step(1.0)
        batch["pixel_values"].fill_(NAN)
        compressor.finish()
    proof_of(compressor)


@dataclasses.dataclass
class Answer:
    """An output that is neither a mapping nor a tuple."""

    scores: torch.Tensor
    extra: dict[str, Any]


def test_outputs_of_any_kind_are_compared() -> None:
    answer = Answer(torch.ones(2), {"deep": [torch.zeros(3), {"attentions": torch.ones(9)}]})
    assert [t.numel() for t in tensors_of(answer)] == [2, 3]
    assert [t.numel() for t in tensors_of({"a": (answer, None, "text", torch.arange(3))})] == [2, 3]


def test_a_kernel_that_knows_half_precision_only() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def half_only(module: Any, query: Any, *rest: Any, **more: Any) -> Any:
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("only fp16 and bf16 are supported")
        return sdpa_attention_forward(module, query, *rest, **more)

    T.AttentionInterface.register("half_only", half_only)
    AttentionMaskInterface.register("half_only", sdpa_mask)
    sample = build("clip")
    model: Any = sample.model.bfloat16()
    model.set_attn_implementation("half_only")
    inputs = {**sample.inputs, "pixel_values": sample.inputs["pixel_values"].bfloat16()}
    compressor = trained(model, [{**inputs, "return_loss": True}] * 2)
    assert proof_of(compressor).kernel == "sdpa"
    assert model.config.vision_config._attn_implementation == "half_only"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts_that_have_no_wide_kernel(implementation: str) -> None:
    torch.manual_seed(0)
    config = T.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=8,
    )  # fmt: skip
    model: Any = T.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    ids = torch.randint(0, 32, (2, 6))
    proof = proof_of(cut_to(model, {"input_ids": ids}, 0.95))
    assert proof.compared == 1
    assert model.config._experts_implementation == implementation


def cut_to(model: Any, inputs: Any, fraction: float, **more: Any) -> vlprune.Compressor:
    more.setdefault("attention", "head")
    compressor = vlprune.Compressor(
        model, vlprune.Magnitude(), {"params": fraction}, example_inputs=inputs, **more
    )
    compressor.finish()
    return compressor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_in_any_dtype(dtype: torch.dtype) -> None:
    sample = build("clip")
    model = sample.model.to(dtype)
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in sample.inputs.items()}
    compressor = cut_to(model, inputs, 0.7)
    proof_of(compressor)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert math.isfinite(float(model(**inputs).logits_per_image.sum()))


@pytest.mark.parametrize("form", ["description", "tuple"])
@pytest.mark.parametrize("wrong", ["unit", "fingerprint", "size"])
def test_a_plan_for_another_model_is_refused_before_a_weight_is_touched(
    form: str, wrong: str
) -> None:
    sample = build("clip")
    before = snapshot(sample.model)
    description, plan = halved(sample.model, "head_dim")
    if wrong == "unit":
        plan = halved(build("clip").model, "head")[1]
    elif wrong == "fingerprint":
        plan = dataclasses.replace(plan, fingerprint="0" * len(plan.fingerprint))
    else:
        first = description.structures[0]
        plan = dataclasses.replace(plan, keep={first.name: (0, first.size)}, fingerprint="")
    with pytest.raises(PlanError):
        vlprune.rewrite(
            sample.model, description if form == "description" else tuple(description), plan
        )
    assert not same(before, snapshot(sample.model))
