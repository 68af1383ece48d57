"""What people put around or into a model before the cut, and into the small model after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import vlprune
from vlprune.cutting.padded import PaddedLinear
from vlprune.errors import UnsupportedError
from vlprune.testing import build

TARGETS = ["q_proj", "v_proj"]


def compressor_of(
    model: Any, inputs: Any = None, fraction: float = 0.8, attention: Any = "head_dim"
) -> vlprune.Compressor:
    return vlprune.Compressor(
        model, vlprune.Magnitude(), {"params": fraction}, example_inputs=inputs, attention=attention
    )


def output(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return vlprune.cutting.difference.tensors_of(model(**inputs))[0]


def padded() -> tuple[Any, Any]:
    sample = build("qwen2_5_vl")
    small = compressor_of(sample.model, sample.inputs, attention="qk_vo").finish()
    assert any(isinstance(m, PaddedLinear) for m in small.modules())
    return small, sample.inputs


def native() -> tuple[Any, Any]:
    sample = build("clip")
    small = compressor_of(sample.model, sample.inputs, 0.7).finish()
    assert not any(isinstance(m, PaddedLinear) for m in small.modules())
    return small, sample.inputs


# -- around the model --------------------------------------------------------------------


def test_a_compiled_model_is_looked_through(tmp_path: Path) -> None:
    sample = build("vit")
    fast: Any = torch.compile(sample.model, backend="eager")
    description = vlprune.discover(fast)
    assert description == vlprune.discover(sample.model)
    ones = {s.name: torch.ones(s.size) for s in description}
    with vlprune.gated(fast, description.structures, ones):
        assert vlprune.cutting.gates.has_gates(sample.model)
    assert not vlprune.cutting.gates.has_gates(sample.model)
    plan = compressor_of(fast).plan()
    assert vlprune.rewrite(build("vit").model, description, plan) is not None
    assert compressor_of(fast, sample.inputs).finish() is fast
    vlprune.save(fast, tmp_path / "small")
    loaded = vlprune.load(tmp_path / "small")
    assert torch.equal(output(loaded.eval(), sample.inputs), output(sample.model, sample.inputs))
    other = build("vit").model
    vlprune.rewrite(torch.compile(other, backend="eager"), description, plan, sample.inputs)
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in loaded.parameters())


def named(name: str) -> Any:
    """A module of that class's name, as far as it can be made without processes and GPUs."""
    cls: Any = type(name, (nn.Module,), {})
    made = cls()
    made.module = build("vit").model
    return made


@pytest.mark.parametrize(
    "name", ["DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"]
)
def test_other_wrappers_are_refused_at_once(name: str) -> None:
    wrapped = nn.DataParallel(build("vit").model) if name == "DataParallel" else named(name)
    for model in (wrapped, torch.compile(wrapped, backend="eager")):
        with pytest.raises(UnsupportedError, match=rf"{name}.*give model\.module"):
            compressor_of(model)


# -- in the model ------------------------------------------------------------------------


def adapted(model: Any, kind: str) -> Any:
    peft = pytest.importorskip("peft")
    if kind == "ia3":
        config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])
    elif kind == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    else:
        config = peft.LoraConfig(
            r=2, target_modules=TARGETS, use_dora=kind == "dora", init_lora_weights=False
        )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt"])
def test_adapters_are_refused_at_once_and_merged_ones_work(kind: str) -> None:
    sample = build("gpt2" if kind == "prompt" else "clip")
    wrapped = adapted(sample.model, kind)
    with pytest.raises(UnsupportedError, match="PEFT"):
        compressor_of(wrapped)
    if kind == "prompt":
        return
    with pytest.raises(UnsupportedError, match="PEFT"):
        compressor_of(wrapped.base_model.model)
    merged = wrapped.merge_and_unload()
    before = output(merged, sample.inputs)
    compressor = compressor_of(merged, sample.inputs, 0.7)
    assert torch.equal(output(merged, sample.inputs), before)
    compressor.finish()
    assert compressor.verification is not None


def test_an_adapter_that_comes_later_is_refused_at_the_first_step() -> None:
    for action in ("begin", "step", "finish"):
        model = build("clip").model
        method = vlprune.Magnitude() if action == "finish" else vlprune.Taylor()
        compressor = vlprune.Compressor(model, method, {"params": 0.8})
        adapted(model, "lora")
        arguments = {"begin": (10,), "step": (0.1,), "finish": ()}[action]
        with pytest.raises(UnsupportedError, match="adapters"):
            getattr(compressor, action)(*arguments)


def pruned(layer: nn.Linear) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(layer, "weight", 0.3)  # type: ignore[no-untyped-call]


def quantized_by_quanto(model: Any) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


class Packed(nn.Linear):
    """As bitsandbytes leaves a layer: the weight is integers in another shape."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def each(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def to_every(model: Any) -> None:
        for module in model.modules():
            if type(module) is nn.Linear:
                change(module)

    return to_every


def pack(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "projection" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Packed(module))


CHANGES: dict[str, Callable[[Any], None]] = {
    "prune": each(pruned),
    "weight_norm": each(nn.utils.weight_norm),
    "parametrized weight_norm": each(nn.utils.parametrizations.weight_norm),
    "spectral_norm": each(nn.utils.spectral_norm),
    "parametrized spectral_norm": each(nn.utils.parametrizations.spectral_norm),
    "quanto": quantized_by_quanto,
    "packed": pack,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_no_plain_parameters_are_refused(change: str) -> None:
    sample = build("clip")
    CHANGES[change](sample.model)
    with pytest.raises(UnsupportedError):
        compressor_of(sample.model, sample.inputs)
    late = build("clip")
    compressor = compressor_of(late.model)
    CHANGES[change](late.model)
    with pytest.raises(UnsupportedError):
        compressor.finish()


def test_undone_it_can_be_compressed() -> None:
    from torch.nn.utils import prune

    sample = build("clip")
    CHANGES["prune"](sample.model)
    for module in sample.model.modules():
        if type(module) is nn.Linear:
            prune.remove(module, "weight")  # type: ignore[no-untyped-call]
    CHANGES["parametrized weight_norm"](sample.model)
    for module in sample.model.modules():
        if nn.utils.parametrize.is_parametrized(module):
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    compressor = compressor_of(sample.model, sample.inputs)
    compressor.finish()
    assert compressor.verification is not None


# -- on the small model ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_padded_layers_are_refused_by_name(kind: str) -> None:
    small, _ = padded()
    with pytest.raises(ValueError, match="padded by vlprune"):
        adapted(small, kind)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_all_linear_layers_pass_padded_ones_by(kind: str) -> None:
    peft = pytest.importorskip("peft")
    small, inputs = padded()
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", use_dora=kind == "dora", init_lora_weights=False
    )
    wrapped = peft.get_peft_model(small, config)
    one = output(wrapped, inputs)
    merged = wrapped.merge_and_unload()
    assert torch.allclose(output(merged, inputs), one, atol=1e-4)
    assert any(isinstance(m, PaddedLinear) for m in merged.modules())


@pytest.mark.parametrize("make", [padded, native])
def test_quantizers_give_nearly_the_same(make: Any) -> None:
    small, inputs = make()
    before = output(small, inputs)
    quantized_by_quanto(small)
    after = output(small, inputs)
    assert (after - before).abs().max() < 0.1 * before.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [padded, native])
def test_dynamic_quantization_gives_nearly_the_same(make: Any) -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantized kernels")
    small, inputs = make()
    before = output(small, inputs)
    quantized = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, dtype=torch.qint8)
    after = output(quantized, inputs)
    assert (after - before).abs().max() < 0.2 * before.abs().max()


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_an_adapter_is_trained_on_a_small_model_merged_and_saved(kind: str, tmp_path: Path) -> None:
    small, inputs = native()
    wrapped = adapted(small, kind)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    before = output(wrapped, inputs)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(**inputs, return_loss=True).loss.backward()
        optimizer.step()
    tuned = output(wrapped, inputs)
    assert not torch.equal(tuned, before)
    merged = wrapped.merge_and_unload()
    assert torch.allclose(output(merged, inputs), tuned, atol=1e-5)
    vlprune.save(merged, tmp_path / "merged")
    for cls in (transformers.CLIPModel, transformers.AutoModel):
        loaded = cls.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(output(loaded, inputs), tuned, atol=1e-5)
    again = compressor_of(merged, inputs, 0.9)
    again.finish()
    assert again.verification is not None


def test_an_adapter_saved_alone_goes_on_the_loaded_small_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    small, inputs = native()
    vlprune.save(small, tmp_path / "base")
    wrapped = adapted(small, "lora")
    tuned = output(wrapped, inputs)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = transformers.CLIPModel.from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(output(loaded, inputs), tuned, atol=1e-5)
    beside = adapted(transformers.CLIPModel.from_pretrained(tmp_path / "base"), "lora")
    beside.save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedError, match=r"holds an adapter.*merge it into its base model"):
        vlprune.load(tmp_path / "base")
