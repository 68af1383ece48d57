"""DeepSpeed in two processes on CPU (gloo): search, cut, train on and save, as one process does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from ranks import launch

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="deepspeed is not installed (pip install 'vlprune[deepspeed]')",
)

HEAD = (
    ranks.HEAD
    + """
import warnings
warnings.simplefilter("ignore")
from vlprune.structures.shards import whole as gathered

os.environ["DS_ACCELERATOR"] = "cpu"
CONFIG = {
    "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # torch's optimizer, as DeepSpeed's must be compiled
}
if world > 1:
    import deepspeed, deepspeed.comm.torch
    deepspeed.comm.torch.build_shm_op = lambda: None  # compiled, too

def zero(stage):
    return {"stage": stage, "stage3_param_persistence_threshold": 100}

def engine_of(model, stage, **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {**CONFIG, "train_micro_batch_size_per_gpu": 2, "zero_optimization": zero(stage),
              **more}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

def batches(count, size=8):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        pixels, labels = torch.randn(size, 3, 16, 16, generator=generator), torch.arange(size) % 2
        yield {"pixel_values": pixels[rank::world], "labels": labels[rank::world]}

def with_vectors(model):
    for parameter in model.parameters():
        if not parameter.dim():  # DeepSpeed 0.19 cannot send a scalar
            parameter.data = parameter.data.reshape(1)
    return model

def refused(call):
    try:
        call()
        return ""
    except vlprune.VlpruneError as error:
        return str(error)
"""
)

SEARCH = (
    HEAD
    + """
METHODS = {"upop": vlprune.UPop(interval=2), "magnitude": vlprune.Magnitude(),
           "taylor": vlprune.Taylor()}

def search(method, stage, first, parts=1, scale=1.0):
    model = build("vit").model.train()
    if first and world > 1:
        engine = engine_of(model, stage, gradient_accumulation_steps=parts)
    compressor = vlprune.Compressor(model, METHODS[method], {"params": 0.7})
    if not first and world > 1:
        engine = engine_of(model, stage, gradient_accumulation_steps=parts)
    if world == 1:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elif scale != 1:
        engine.optimizer.override_loss_scale(scale)

    def halves(batch):
        for part in range(parts):
            yield {name: values[part::parts] for name, values in batch.items()}

    def train(engine, optimizer, compressor=None):
        losses = []
        for number, batch in enumerate(batches(6)):
            total = 0.0
            for half in halves(batch):
                loss = (engine or model)(**half).loss
                engine.backward(loss) if engine else (loss / parts).backward()
                if engine and not engine.is_gradient_accumulation_boundary():
                    engine.step()
                total += float(loss.detach()) / parts
            if compressor is not None:
                compressor.step((number + 1) / 6)
            if engine:
                engine.step()
            else:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(total)
        return losses[-1]

    with compressor:
        train(engine if world > 1 else None, optimizer if world == 1 else None, compressor)
        gates = float(compressor.search.total.sum()) if method == "upop" else 0.0
        assert compressor.finish() is model
    split = sum(hasattr(p, "ds_id") for p in model.parameters())
    left = sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters())
    left += sum("pre_bwd_fn" in module.__dict__ for module in model.modules())
    old, new, optimizer = "", None, None
    if world > 1:
        batch = next(batches(1))
        old = refused(lambda: engine.backward(engine(**batch).loss))
        new = engine_of(model, stage, gradient_accumulation_steps=parts)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = train(new, optimizer)
    out = f"{folder}/{method}"
    if stage == 3 or rank == 0:
        vlprune.save(model, out, extras={"note.txt": str(rank)})
    proof = compressor.verification
    result[method] = {
        "plan": compressor.plan().to_json(), "loss": loss, "split": split, "folder": out,
        "params": sum(gathered(p).numel() for p in model.parameters()), "dtype": proof.dtype,
        "report": compressor.report()["params"], "difference": proof.difference, "old": old,
        "gates": gates, "left": left,
    }

search("upop", STAGE, False, scale=512.0)
search("magnitude", STAGE, True)
search("taylor", STAGE, True, parts=2)
end()
"""
)


TRAINER = (
    HEAD
    + """
from transformers import Trainer, TrainingArguments

generator = torch.Generator().manual_seed(0)
items = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": n % 2}
         for n in range(16)]
config = {**CONFIG, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
          "gradient_accumulation_steps": "auto", "zero_optimization": {
              **zero(STAGE), "stage3_gather_16bit_weights_on_model_save": True}}

def trainer_of(model, **more):
    arguments = TrainingArguments(
        output_dir=folder, max_steps=6, per_device_train_batch_size=2, save_steps=3, seed=3,
        learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        optim="sgd", deepspeed=config if STAGE else None)
    return Trainer(model=model, args=arguments, train_dataset=items, **more)

for again in (False, True):  # the second time from the checkpoint in the middle
    model = build("vit").model.train()
    compressor = vlprune.Compressor(model, vlprune.UPop(interval=1), {"params": 0.7})
    trainer = trainer_of(model, callbacks=[compressor.callback()])
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if again else None)
    loss = trainer.evaluate(items)["eval_loss"]
    assert compressor.finish() is model
    result[f"{again}"] = {
        "engine": type(trainer.model_wrapped).__name__, "plan": compressor.plan().to_json(),
        "loss": loss, "dtype": compressor.verification.dtype, "old": refused(trainer.train)}
trainer = trainer_of(model)
before = [gathered(p).detach().clone() for p in model.parameters()]
trainer.train()
moved = [not torch.equal(a, gathered(p)) for a, p in zip(before, model.parameters())]
result["moved"] = [sum(moved), len(moved)]
result["loss"] = trainer.evaluate(items)["eval_loss"]
if STAGE == 3 or rank == 0:
    vlprune.save(model, f"{folder}/small")
end()
"""
)

ACCELERATED = (
    HEAD
    + """
from accelerate import Accelerator, DeepSpeedPlugin

# accelerate steps inside accelerator.backward; half precision, as an engine trains in it
plugin = DeepSpeedPlugin(hf_ds_config={
    **CONFIG, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1,
    "bf16": {"enabled": True}, "zero_optimization": zero(STAGE)})
accelerator = Accelerator(mixed_precision="bf16", deepspeed_plugin=plugin)
model = build("vit").model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ready, optimizer = accelerator.prepare(model, optimizer)
compressor = vlprune.Compressor(
    model, vlprune.UPop(interval=2), {"macs": 0.7}, example_inputs=next(batches(1)))
with compressor:
    for number, batch in enumerate(batches(6)):
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        accelerator.backward(ready(**batch).loss)
        compressor.step((number + 1) / 6)
        optimizer.step()
        optimizer.zero_grad()
    compressor.remember_optimizer(optimizer)
    compressor.end()
    with torch.no_grad():
        masked = ready(**batch).logits
with torch.no_grad():  # the gates are gone, and the weights are as if they were not
    result["emptied"] = torch.equal(ready(**batch).logits, masked)
compressor.finish()
result |= {"plan": compressor.plan().to_json(), "dtype": compressor.verification.dtype,
           "difference": compressor.verification.difference,
           "dtypes": sorted({str(gathered(p).dtype) for p in model.parameters()})}
result["old"] = refused(lambda: accelerator.backward(ready(**batch).loss))
end()
"""
)

FAMILIES = (
    HEAD
    + """
def outputs(model, inputs):
    model.eval()
    with torch.no_grad():
        return tensors_of(model(**inputs))

# projections that are padded; a forward of vlprune's own and a folded temperature; transposed
# weights
for family in ["vit", "qwen2_vl", "blip", "gpt2"]:
    sample, other = build(family), build(family)
    model, _ = with_vectors(sample.model), with_vectors(other.model)
    engine = engine_of(model, 3)
    description = vlprune.discover(model)
    assert description == vlprune.discover(other.model), family
    plan = make_plan(description, lambda size: max(1, size // 2))
    before = [*map(id, model.parameters())]
    try:  # the second process fails, so the first puts everything back, too
        import vlprune.cutting.rewrite as cutting
        compare = cutting.compare
        def fails(*args):
            proof = compare(*args)
            if rank == 1:
                raise vlprune.errors.VerificationError("as if it differed")
            return proof
        cutting.compare = fails
        error = refused(lambda: vlprune.rewrite(model, description, plan, verify=sample.inputs))
    finally:
        cutting.compare = compare
    same = before == [*map(id, model.parameters())]
    dense = difference(outputs(other.model, other.inputs), outputs(engine, sample.inputs)).relative
    vlprune.rewrite(model, description, plan, verify=sample.inputs)
    vlprune.rewrite(other.model, description, plan)
    state = {name: gathered(t) for name, t in model.state_dict(keep_vars=True).items()}
    bits = all(torch.equal(t, state[name]) for name, t in other.model.state_dict().items())
    lost = refused(lambda: model(**sample.inputs))
    engine = engine_of(model, 3)
    small = difference(outputs(other.model, other.inputs), outputs(engine, sample.inputs)).relative
    result[family] = [error, same, dense, bits, lost, small]
end()
"""
)

REFUSED = (
    HEAD
    + """
from small_models import clip
sample = build("vit")
split, shared = sample.model, with_vectors(clip((2, 2)))
pixels = {"pixel_values": sample.inputs["pixel_values"]}
jsp = vlprune.Compressor(
    shared, vlprune.JSP(match=True), {"params": 0.7}, held_out=[sample.inputs])
calibrated = vlprune.Compressor(
    split, vlprune.Magnitude(), {"params": 0.7}, calibration=[pixels])
engine = engine_of(split, 3)
make = lambda method, budget, **more: vlprune.Compressor(split, method, budget, **more)
engine_of(shared, 3)
result["before"] = refused(jsp.attach)
result["after"] = refused(
    lambda: make(vlprune.JSP(), {"params": 0.7}, held_out=[sample.inputs]))
result["calibration"] = refused(calibrated.finish)
result["latency"] = refused(
    lambda: make(vlprune.Magnitude(), {"latency": 0.7}, example_inputs=sample.inputs))
result["engine"] = refused(
    lambda: vlprune.Compressor(engine, vlprune.Magnitude(), {"params": 0.7}))
end()
"""
)

JSP = (
    HEAD
    + """
from small_models import clip
from vlprune.methods import Alignment
from vlprune.methods.vectors import Vectors, alignment
from vlprune.structures.shards import changing
from vlprune.training.turns import Turns

# what is pulled joins the gradient of the next backward pass, once
pulled, plain = (build("vit").model.train() for _ in range(2))
structures = vlprune.discover(pulled).structures
wanted = Vectors({s.name: (torch.arange(s.size) % 2).float() for s in structures})
turns = Turns(pulled, structures, None, (), None)
engine = engine_of(pulled, 2)
engine.optimizer.override_loss_scale(64.0)
optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
for number, batch in enumerate(batches(3)):
    if number == 1:
        turns.align(Alignment(wanted, 0.5))
    engine.backward(engine(**batch).loss)
    engine.step()
    whole_batch = {name: torch.cat([values, values]) for name, values in batch.items()}
    for name, values in batch.items():
        both = [torch.empty_like(values) for _ in range(world)]
        dist.all_gather(both, values.contiguous())
        whole_batch[name] = torch.cat(both)
    loss = plain(**whole_batch).loss + (
        0.5 * alignment(plain, structures, wanted) if number == 1 else 0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
result["pulled"] = max(
    float((a - b).abs().max()) for a, b in zip(pulled.parameters(), plain.parameters()))

# what is changed in place stays, as precisely as the optimizer knows it
half = build("vit").model.train()
engine = engine_of(half, 2, bf16={"enabled": True})
weight = half.vit.layers[0].mlp.fc1.weight
with changing(weight) as copy:
    kept = copy.mul_(1.001).clone()
for group in engine.optimizer.param_groups:
    group["lr"] = 0.0
engine.backward(engine(**next(batches(1))).loss)
engine.step()
result["changed"] = [str(kept.dtype), torch.equal(weight, kept.bfloat16())]
from deepspeed.utils import safe_get_full_fp32_param
result["changed"].append(torch.equal(safe_get_full_fp32_param(weight), kept))

# a whole search
def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 60, (4, 6), generator=g), "return_loss": True,
            "pixel_values": torch.randn(4, 3, 16, 16, generator=g)}

model = with_vectors(clip((2, 2)).train())
compressor = vlprune.Compressor(
    model, vlprune.JSP(every=1, learning_rate=0.05, match=True), {"params": 0.75},
    held_out=[batch(100 + i) for i in range(2)])
engine = engine_of(model, 2)
with compressor:
    for step in range(20):
        engine.backward(engine(**batch(2 * step + rank)).loss)
        compressor.step((step + 1) / 20)
        engine.step()
    waiting = len(compressor.turns._waiting)
    compressor.finish()
plan = compressor.plan()
stored = sum(p.numel() for p in model.parameters())
engine = engine_of(model, 2)
engine.backward(engine(**batch(7 + rank)).loss)  # tied weights
engine.step()
result["searched"] = {
    "plan": plan.to_json(), "shares": len(plan.share), "stored": stored, "waiting": waiting,
    "left": compressor.params_after / compressor.params_before,
    "difference": compressor.verification.difference,
    "sum": sum(float(p.double().abs().sum()) for p in model.parameters())}
end()
"""
)


def at_stage(stage: int, code: str) -> str:
    return f"STAGE = {stage}\n{code}"


@pytest.fixture(scope="module")
def searches(python: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """{ZeRO stage: what each process found}; stage 0 is one process without DeepSpeed."""
    found = {}
    for stage in (0, 2, 3):
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        found[stage] = launch(python, folder, at_stage(stage, SEARCH), 2 if stage else 1)
    return found


@pytest.mark.parametrize("method", ["upop", "magnitude", "taylor"])
@pytest.mark.parametrize("stage", [2, 3])
def test_an_engines_model_is_searched_cut_and_trained_on_as_in_one_process(
    stage: int, method: str, searches: dict[int, Any]
) -> None:
    import vlprune

    (alone,) = (found[method] for found in searches[0])
    first, second = (found[method] for found in searches[stage])
    assert first["plan"] == second["plan"] == alone["plan"]
    assert first["params"] == alone["params"] == first["report"]["after"]
    assert first["split"] == (40 if stage == 3 else 0)  # the small model, as the large one
    assert first["dtype"] == "float64"
    assert first["difference"] < 1e-12
    assert first["gates"] == pytest.approx(alone["gates"], rel=1e-4)  # not times the loss scale
    assert "give the small model to a new engine" in first["old"]
    assert first["left"] == 0  # of the old engine's hooks
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(alone["loss"], rel=1e-4)
    models = [vlprune.load(result["folder"]) for result in (alone, first)]
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert (Path(first["folder"]) / "note.txt").read_text() == "0"  # written by one process


@pytest.fixture(scope="module")
def trainers(python: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """As ``searches``, by a Trainer; stage 0 is DistributedDataParallel."""
    found = {}
    for stage in (0, 2, 3):
        folder = tmp_path_factory.mktemp(f"trainer{stage}")
        found[stage] = [folder, *launch(python, folder, at_stage(stage, TRAINER))]
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_with_deepspeed_searches_resumes_cuts_and_trains_on(
    stage: int, trainers: dict[int, Any]
) -> None:
    import vlprune

    (_, alike, _), (folder, first, second) = trainers[0], trainers[stage]
    for again in ("False", "True"):
        assert first[again]["plan"] == second[again]["plan"] == alike["False"]["plan"]
        assert first[again]["loss"] == pytest.approx(alike["False"]["loss"], rel=1e-4)
        assert first[again]["engine"] == "DeepSpeedEngine"
        assert first[again]["dtype"] == "float64"
        assert "make a new Trainer for the small model" in first[again]["old"]
    moved, of = first["moved"]
    assert moved >= 38  # the loss does not depend on the biases of the keys
    assert of == 40
    assert first["loss"] == pytest.approx(alike["loss"], rel=1e-3)
    small, like = (vlprune.load(one / "small") for one in (folder, trainers[0][0]))
    for one, two in zip(small.parameters(), like.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_accelerate_steps_before_the_search_does_and_in_half_precision(
    python: Any, tmp_path: Path
) -> None:
    found = [launch(python, tmp_path, at_stage(stage, ACCELERATED)) for stage in (2, 3)]
    for first, second in found:
        assert first["plan"] == second["plan"]
        assert first["plan"] == found[0][0]["plan"]
        assert first["emptied"]
        assert first["dtype"] == "float64"
        assert first["difference"] < 1e-9
        assert first["dtypes"] == ["torch.bfloat16"]
        assert "give the small model to a new engine" in first["old"]


def test_split_models_of_every_kind_are_cut_or_put_back(python: Any, tmp_path: Path) -> None:
    first, second = launch(python, tmp_path, FAMILIES)
    assert len(first) == 4
    for family, (error, same, dense, bits, lost, small) in first.items():
        assert "process 1 has failed" in error, family
        assert "as if it differed" in error, family
        assert second[family][0].startswith("as if it differed"), family
        assert same, f"{family}: other parameters than before the failed cut"
        assert dense < 1e-5, family
        assert bits, f"{family}: other weights than those of a cut in one process"
        assert "nothing gathers them now" in lost, family
        assert small < 1e-5, family


def test_what_split_weights_do_not_allow_is_refused(python: Any, tmp_path: Path) -> None:
    for said in launch(python, tmp_path, REFUSED):
        assert "ZeRO stage 2" in said["before"]
        assert "ZeRO stage 2" in said["after"]
        assert "deepspeed.initialize" in said["calibration"]
        assert "deepspeed.initialize" in said["latency"]
        assert "give model.module" in said["engine"]


def test_a_search_that_pulls_at_weights_does_so_through_zero_2(python: Any, tmp_path: Path) -> None:
    first, second = launch(python, tmp_path, JSP)
    assert first["pulled"] < 1e-6
    assert first["changed"] == ["torch.float32", True, True]
    assert {**first["searched"], "difference": 0} == {**second["searched"], "difference": 0}
    searched = first["searched"]
    assert searched["waiting"] > 0
    assert searched["shares"] > 0
    assert searched["left"] <= 0.75
    assert searched["difference"] < 1e-9
