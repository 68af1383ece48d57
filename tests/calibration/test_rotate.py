"""The free basis of a head: nothing changes, and the first dimensions are the best ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
from vlprune.calibration.batches import batches_of
from vlprune.calibration.passes import calls_of
from vlprune.calibration.rotate import Turn, head_moments, turns_of
from vlprune.cutting.difference import difference, tensors_of
from vlprune.testing import build


def batches(family: str, count: int = 3) -> list[dict[str, Any]]:
    """Batches like the family's own inputs, in float64."""
    found = []
    for number in range(count):
        g = torch.Generator().manual_seed(number)
        batch = {}
        for name, value in build(family).inputs.items():
            if value.is_floating_point():
                value = torch.randn(value.shape, generator=g).double()
            elif name == "input_ids":
                plain = (value >= 6) & (value < 58)
                value = torch.where(plain, torch.randint(6, 58, value.shape, generator=g), value)
            batch[name] = value
        found.append(batch)
    return found


def answers(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(**batch))


FREE = ["clip", "siglip", "blip_captioning", "bert_decoder", "deit", "dinov2", "detr", "swin"]
ROTARY = {"llava": "language_model", "qwen2_vl": "", "gemma3": "language_model"}


@pytest.mark.parametrize("family", [*FREE, *ROTARY])
def test_outputs_stay_and_only_rotary_scores_are_refused(family: str) -> None:
    model: nn.Module = build(family).model.double()
    given = batches(family)
    before = [answers(model, batch) for batch in given]
    refused = vlprune.rotate(model, given)
    for batch, expected in zip(given, before, strict=True):
        assert difference(expected, answers(model, batch)).relative < 1e-10
    scores = {s.name for s in vlprune.discover(model, "qk_vo") if s.kind == "attention_qk"}
    expected_names = {n for n in scores if ROTARY[family] in n} if family in ROTARY else set()
    assert refused.keys() == expected_names
    assert all("rotary" in reason for reason in refused.values())


def test_norms_of_queries_and_keys_are_refused_and_what_no_batch_reaches() -> None:
    refused = vlprune.rotate(build("internvl_qk_norm").model, batches("internvl_qk_norm", 1))
    assert {n.rpartition(".")[2] for n in refused} == {"qk"}
    refused = vlprune.rotate(build("blip").model, batches("blip", 1))
    assert all("crossattention" in name for name in refused)
    assert set(refused.values()) == {"no calibration batch reaches it"}


def test_one_batch_of_each_kind_is_enough() -> None:
    """A text in one batch, a picture with it in another: both towers of a LLaVA are turned."""
    pictures = batches("llava", 2)
    texts = [{"input_ids": torch.randint(6, 58, (2, 7))} for _ in range(2)]
    model: nn.Module = build("llava").model.double()
    refused = vlprune.rotate(model, [*texts, *pictures])
    assert refused.keys() == {
        s.name
        for s in vlprune.discover(model, "qk_vo")
        if s.kind == "attention_qk" and s.tower == "text"
    }


class Attention(nn.Module):
    """q^T k and W_o v of one block, on the raw activations: what a rank-r basis leaves of them."""

    def __init__(self, model: nn.Module, turn: Turn, calls: list[Any]) -> None:
        super().__init__()
        seen: dict[str, list[Tensor]] = {"q": [], "k": [], "c": []}
        rows = {"q": turn.left, "k": turn.right} if turn.right is not None else {}
        handles = []
        for name, part in rows.items():
            assert part is not None
            module = model.get_submodule(part.module)
            stop = part.start + part.heads * part.size

            def after(
                _m: Any, _a: Any, y: Tensor, name: str = name, p: Any = part, stop: int = stop
            ):
                heads = y[..., p.start : stop].unflatten(-1, (p.heads, p.size))
                seen[name].append(heads.transpose(1, 2))

            handles.append(module.register_forward_hook(after))
        if turn.columns:
            reader = model.get_submodule(turn.columns)
            handles.append(reader.register_forward_pre_hook(lambda _m, a: seen["c"].append(a[0])))
        with torch.no_grad():
            for call in calls:
                call()
        for handle in handles:
            handle.remove()
        self.seen = {name: torch.cat(parts) for name, parts in seen.items() if parts}


def singular(model: nn.Module, turn: Turn, calls: list[Any], given: Any) -> Tensor:
    """The diagonal of the product of the moments' roots after a turn: (heads, size)."""
    left, right = head_moments(model, [turn], given, calls)[0]
    if right is not None:
        group = len(left) // len(right)
        left = left.unflatten(0, (len(right), group)).sum(1)
        for one in (left, right):  # both are diagonal, and the same
            off = one - torch.diag_embed(one.diagonal(dim1=1, dim2=2))
            assert float(off.abs().max()) < 1e-7 * float(one.abs().max())
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8 * float(left.max()))
        return left.diagonal(dim1=1, dim2=2)
    reader: Any = model.get_submodule(turn.columns)
    weight = reader.weight.unflatten(1, (len(left), -1))
    group = len(left) // turn.left.heads
    gram = torch.einsum("ohi,ohj->hij", weight, weight).unflatten(0, (-1, group)).sum(1)
    root = (gram @ left.unflatten(0, (-1, group)).sum(1)).diagonal(dim1=1, dim2=2)
    return root.clamp(min=0).sqrt()


@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_keeping_the_first_is_the_best_low_rank_approximation_of_the_scores(family: str) -> None:
    model: nn.Module = build(family).model.double()
    given = batches_of(model, batches(family, 6))
    calls = calls_of(model, given)
    dense = {t.structure.name: Attention(model, t, calls).seen for t in turns_of(model)}
    vlprune.rotate(model, given)
    for turn in turns_of(model):
        if turn.kind != "attention_qk":
            continue
        after = Attention(model, turn, calls).seen
        before = dense[turn.structure.name]
        values = singular(model, turn, calls, given)
        assert (values[:, 1:] <= values[:, :-1] * (1 + 1e-6)).all()
        # over all pairs of a query and a key, as pooled moments see them
        q, k = (after[n].transpose(0, 1).flatten(1, 2) for n in ("q", "k"))
        mean = after["k"].mean(2, keepdim=True)
        k = (after["k"] - mean).transpose(0, 1).flatten(1, 2)
        old_q = before["q"].transpose(0, 1).flatten(1, 2)
        old_k = (before["k"] - before["k"].mean(2, keepdim=True)).transpose(0, 1).flatten(1, 2)
        full = old_q @ old_k.mT
        for r in (1, turn.structure.size // 2, turn.structure.size):
            lost = full - q[..., :r] @ k[..., :r].mT
            measured = lost.square().sum((1, 2))
            predicted = values[:, r:].square().sum(1)
            scale = float(full.square().sum())
            torch.testing.assert_close(measured, predicted, rtol=1e-5, atol=1e-9 * scale)
            best = torch.linalg.svdvals(full)[:, r:].square().sum(1)
            torch.testing.assert_close(measured, best, rtol=1e-5, atol=1e-9 * scale)


@pytest.mark.parametrize("family", ["clip", "gpt2", "llava"])
def test_keeping_the_first_values_is_the_best_low_rank_output_of_a_head(family: str) -> None:
    model: nn.Module = build(family).model.double()
    given = batches_of(model, batches(family, 6))
    calls = calls_of(model, given)
    vlprune.rotate(model, given)
    turns = [t for t in turns_of(model) if t.kind == "attention_vo"]
    assert len(turns) == (2 if family == "gpt2" else 4)
    for turn in turns:
        c = Attention(model, turn, calls).seen["c"].flatten(0, 1)
        heads = c.shape[1] // turn.structure.size
        group = heads // turn.left.heads
        reader: Any = model.get_submodule(turn.columns)
        weight = reader.weight.T if family == "gpt2" else reader.weight
        weight = weight.unflatten(1, (heads, -1))
        c = c.unflatten(1, (heads, -1))
        for head in range(heads // group):
            own = slice(head * group, (head + 1) * group)
            if group > 1:  # one basis for several: only the order can be checked
                gram = torch.einsum("ohi,ohj->ij", weight[:, own], weight[:, own])
                moments = torch.einsum("thi,thj->ij", c[:, own], c[:, own])
                worth = (gram.diagonal() * moments.diagonal()).sqrt()
                off = gram * moments.max() - torch.diag(gram.diagonal()) * moments.max()
                assert float(off.abs().max()) < 1e-7 * float(gram.max() * moments.max())
                assert (worth[1:] <= worth[:-1] * (1 + 1e-6)).all()
                continue
            full = c[:, head] @ weight[:, head].T
            for r in (1, turn.structure.size // 2):
                lost = full - c[:, head, :r] @ weight[:, head, :r].T
                best = torch.linalg.svdvals(full)[r:].square().sum()
                torch.testing.assert_close(lost.square().sum(), best, rtol=1e-4, atol=1e-9)


def test_padding_does_not_decide_the_basis() -> None:
    """Other tokens under the padding, the same basis; not so where they count."""
    given = batches("bert", 2)
    masked = [{**b, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)} for b in given]
    other = [{**b, "input_ids": b["input_ids"].clone()} for b in masked]
    for batch in other:
        batch["input_ids"][:, 4:] = 7
    rotated = []
    for one in (masked, other, given):
        copy = build("bert").model.double()
        vlprune.rotate(copy, one)
        rotated.append(copy.state_dict())
    moved = {
        n: [float((rotated[0][n] - r[n]).abs().max()) for r in rotated[1:]] for n in rotated[0]
    }
    assert all(same < 1e-12 for same, _ in moved.values())
    assert max(unlike for _, unlike in moved.values()) > 1e-3


def test_half_precision_is_turned_and_rounded() -> None:
    model: nn.Module = build("clip").model.bfloat16()
    given = [
        {n: v.float() if v.is_floating_point() else v for n, v in batches("clip", 1)[0].items()}
    ]
    before = answers(model.float(), given[0])
    assert not vlprune.rotate(model.bfloat16(), given)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert difference(before, answers(model.float(), given[0])).relative < 0.1


def test_keys_and_values_that_another_part_reads_from_a_cache_are_left_alone() -> None:
    """PI0's two language models share one cache: turned in one, they would be foreign in the
    other."""
    sample = build("pi0")
    model: nn.Module = sample.model.double()
    batch = {n: v.double() if v.is_floating_point() else v for n, v in sample.inputs.items()}
    before = answers(model, batch)
    refused = vlprune.rotate(model, [batch])
    assert difference(before, answers(model, batch)).relative < 1e-10
    reason = refused["model.vlm.language_model.layers.0.self_attn.vo"]
    assert "in a cache" in reason
