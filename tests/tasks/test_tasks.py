"""Metrics by hand, and evaluation against slow references."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vlprune
from vlprune.errors import DataError, RecipeError
from vlprune.recipe.spec import DataSpec, ModelSpec
from vlprune.tasks import TASKS, CaptioningTask, RetrievalTask, VqaTask
from vlprune.tasks.retrieval import recalls
from vlprune.tasks.vqa import rank_answers
from vlprune.tasks.vqa_metric import normalise, vqa_accuracy
from vlprune.training.teacher import Taught

SMALL = ModelSpec(width=16, heads=2, vision_layers=1, text_layers=1, image_size=32, patch_size=16)
FEW = DataSpec(format="shapes", train_items=6, test_items=4)


@pytest.mark.parametrize(
    ("said", "people", "accuracy"),
    [
        ("yes", ["yes"] * 10, 1.0),
        ("no", ["yes"] * 10, 0.0),
        # 1 of 10 agrees: leaving that one out 0/3, leaving another out 1/3 (nine times)
        ("cat", ["cat"] + ["dog"] * 9, 0.3),
        # 2: leaving one of them out 1/3 (twice), another 2/3 (eight times)
        ("cat", ["cat"] * 2 + ["dog"] * 8, 0.6),
        # 3: leaving one of them out 2/3 (three times), another 1 (seven times)
        ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("The cat.", ["cat"] * 5 + ["dog"] * 5, 1.0),
        ("two", ["2"] * 5 + ["3"] * 5, 1.0),
        ("The cat", ["cat"] * 10, 0.0),  # all agree: compared literally
        ("red", ["red"], 1.0),
        ("blue", ["red"], 0.0),
    ],
)
def test_vqa_accuracy_by_hand(said: str, people: list[str], accuracy: float) -> None:
    assert vqa_accuracy(said, people) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("An apple, a pear", "apple pear"),
        ("dont know", "don't know"),
        ("TEN\n", "10"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("black/white", "black white"),
        ("what ?", "what"),
    ],
)
def test_answers_are_normalised(text: str, want: str) -> None:
    assert normalise(text) == want


def test_recalls_by_hand() -> None:
    owner = torch.tensor([0, 0, 1, 2])
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3],  # its own text first
            [0.8, 0.7, 0.6, 0.1],  # its own text third
            [0.4, 0.3, 0.2, 0.5],  # its own text first
        ]
    )
    found = recalls(scores, scores, owner)
    assert found["image_to_text_r1"] == pytest.approx(2 / 3)
    assert found["image_to_text_r5"] == 1
    # texts: t0 -> image 0 first; t1 (image 0) -> image 1 first; t2 -> image 1; t3 -> image 2
    assert found["text_to_image_r1"] == pytest.approx(3 / 4)
    assert found["recall_mean"] == pytest.approx((2 / 3 + 1 + 1 + 3 / 4 + 1 + 1) / 6)


def test_ranking_agrees_with_the_models_own_loss(tmp_path: Path) -> None:
    task = VqaTask(SMALL, FEW, tmp_path)
    torch.manual_seed(0)
    model = task.new_model().eval()
    items = list(task.test[:3])
    inputs = task._questions(items)
    tokenizer: Any = task.processor.tokenizer
    # answers of one and two words, so that padding matters
    words = ["yes", "red circle", "no", "blue triangle"]
    ids = tokenizer(words, padding=True, return_tensors="pt")["input_ids"]
    best = rank_answers(model, inputs, ids, tokenizer.pad_token_id)
    states = model.text_encoder(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        encoder_hidden_states=model.vision_model(inputs["pixel_values"])[0],
    )[0]  # fmt: skip
    for row in range(3):
        costs = []
        for answer in ids:
            tokens = answer[answer != tokenizer.pad_token_id][None]
            logits = model.text_decoder(
                input_ids=tokens, encoder_hidden_states=states[row : row + 1],
                encoder_attention_mask=inputs["attention_mask"][row : row + 1],
            ).logits[0]  # fmt: skip
            follow = logits[:-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
            costs.append(float(follow.sum()))
        assert int(best[row]) == max(range(4), key=costs.__getitem__)


def test_keeping_few_candidates_only_narrows(tmp_path: Path) -> None:
    task = VqaTask(SMALL, FEW, tmp_path)
    model = task.new_model().eval()
    inputs = task._questions(list(task.test[:3]))
    ids = task.processor.tokenizer(task.answers, padding=True, return_tensors="pt")["input_ids"]
    assert rank_answers(model, inputs, ids, 0, keep=1).shape == (3,)
    assert rank_answers(model, inputs, ids, 0, keep=99).shape == (3,)


@pytest.mark.parametrize("cls", TASKS.values(), ids=TASKS)
def test_a_task_trains_a_step_and_evaluates(cls: Any, tmp_path: Path) -> None:
    task = cls(SMALL, FEW, tmp_path)
    model = task.dense_model()
    batch = task.collate(list(task.train[:4]), random.Random(0))
    loss = task.objective(model)(**batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    done = []
    metrics = task.evaluate(model, lambda n, note="": done.append(n), batch_size=3)
    assert sum(done) == len(task.test)
    assert task.metric in metrics
    assert all(value >= 0 for value in metrics.values())
    again = task.evaluate(model, lambda n, note="": None, batch_size=2)
    assert metrics == pytest.approx(again)
    assert len(task.predict(model, list(task.test[:2]))) == 2


@pytest.mark.parametrize("name", ["vqa", "captioning", "grounding"])
def test_the_config_in_a_folder_is_read_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = TASKS[name]
    maker = cls(SMALL, FEW, tmp_path / "data")
    vlprune.save(maker.new_model(), tmp_path / "model", processor=maker.processor)
    task = cls(ModelSpec(path=str(tmp_path / "model")), FEW, tmp_path / "data")
    model = task.dense_model()
    asked = []
    read = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(
        transformers.AutoConfig,
        "from_pretrained",
        lambda path, **told: asked.append(path) or read(path, **told),
    )
    for number in range(3):
        task.collate(list(task.train[:2]), random.Random(number))
    task.evaluate(model, lambda n, note="": None, batch_size=1)
    assert len(asked) <= 1


def test_the_label_is_what_most_people_say(tmp_path: Path) -> None:
    task = VqaTask(SMALL, FEW, tmp_path)
    item = replace(task.train[0], answers=("red",) * 6 + ("blue",) * 4)
    labels = task.collate([item])["labels"][0]
    said = task.processor.tokenizer.decode(labels[labels >= 0], skip_special_tokens=True)
    assert said == "red"


def test_all_answers_are_learnt_by_their_frequency(tmp_path: Path) -> None:
    """Summed over an answer's tokens, weighted, and over the number of questions."""
    task = VqaTask(SMALL, FEW, tmp_path, {"targets": "all"})
    answers = (("red",) * 6 + ("blue", "dark blue") * 2, ("two",), ("yes", "no"))
    weights = (1.0, 0.2, 1.0)  # as if the second were Visual Genome's
    items = [
        # of one length: transformers' decoder reads the padding of shorter questions too
        replace(item, text=task.train[0].text, answers=said, weight=weight)
        for item, said, weight in zip(task.train, answers, weights, strict=False)
    ]
    model = task.dense_model().eval()
    batch = task.collate(items, random.Random(0))
    assert batch["owners"].tolist() == [0, 0, 0, 1, 2, 2]
    assert batch["weights"].tolist() == pytest.approx([0.6, 0.2, 0.2, 0.2, 0.5, 0.5])
    objective = task.objective(model)
    loss = objective(**batch)["loss"]
    want = 0.0
    for owner, weight, said in zip(
        batch["owners"].tolist(),
        batch["weights"].tolist(),
        ("red", "blue", "dark blue", "two", "yes", "no"),
        strict=True,
    ):
        one = task.collate([replace(items[owner], answers=(said,))])
        tokens = int((one["labels"][:, 1:] >= 0).sum())
        want += weight * tokens * float(model(**one).loss) / len(items)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.text_decoder.cls.parameters())


@pytest.mark.parametrize(
    ("cls", "targets"), [(CaptioningTask, ""), (VqaTask, "frequent"), (VqaTask, "all")]
)
def test_smoothed_labels_by_hand(cls: Any, targets: str, tmp_path: Path) -> None:
    """0.9 of the token and 0.1 of all tokens evenly; in no config, and in no forward but this."""
    options = {"smoothing": 0.1, **({"targets": targets} if targets else {})}
    task = cls(SMALL, FEW, tmp_path, options)
    model = task.dense_model().eval()
    objective = task.objective(model)
    batch = task.collate(list(task.train[:3]), random.Random(0))
    own = {k: v for k, v in batch.items() if k not in ("owners", "weights")}
    logits = []
    hook = model.text_decoder.register_forward_hook(lambda _m, _i, out: logits.append(out.logits))
    plain = float(model(**own).loss)
    loss = float(objective(**batch)["loss"])
    hook.remove()
    after, right = logits[-1][:, :-1].log_softmax(-1), batch["labels"][:, 1:]
    known = right >= 0
    said = after.gather(2, right.clamp(min=0)[..., None])[..., 0]
    each = -(0.9 * said + 0.1 * after.mean(-1))[known]
    want = float(each.sum()) / len(right) if targets == "all" else float(each.mean())
    assert loss == pytest.approx(want, rel=1e-5)
    assert float(model(**own).loss) == plain
    assert model.text_decoder.label_smoothing == 0.0
    with pytest.raises(ValueError, match="pixel_values"):
        objective(**{**own, "pixel_values": None})
    assert model.text_decoder.label_smoothing == 0.0
    model.save_pretrained(tmp_path / "saved")
    assert (
        transformers.AutoConfig.from_pretrained(tmp_path / "saved").text_config.label_smoothing
        == 0.0
    )


@pytest.mark.slow
def test_a_smoothed_loss_can_be_compiled(tmp_path: Path) -> None:
    task = VqaTask(SMALL, FEW, tmp_path, {"targets": "all", "smoothing": 0.1})
    model = task.dense_model().eval()
    objective = task.objective(model)
    batch = task.collate(list(task.train[:3]), random.Random(0))
    compiled: Any = torch.compile(objective, backend="eager")
    torch.testing.assert_close(compiled(**batch)["loss"], objective(**batch)["loss"])
    assert model.text_decoder.label_smoothing == 0.0


def test_one_answer_is_learnt_as_ever(tmp_path: Path) -> None:
    """By default, and wherever the model itself is asked, not its objective."""
    task = VqaTask(SMALL, FEW, tmp_path)
    model = task.dense_model().eval()
    assert task.objective(model) is model
    batch = task.collate(list(task.train[:3]), random.Random(0))
    every = VqaTask(SMALL, FEW, tmp_path, {"targets": "all"})
    assert every.example_inputs().keys() == task.example_inputs().keys() == batch.keys()
    assert torch.equal(every.objective(model)(**batch).loss, model(**batch).loss)


def test_a_teacher_is_asked_for_all_answers_too(tmp_path: Path) -> None:
    task = VqaTask(SMALL, FEW, tmp_path, {"targets": "all"})
    item = replace(task.train[0], answers=("red", "blue", "blue"))
    batch = task.collate([item, task.train[1]], random.Random(0))
    model, teacher = task.dense_model().eval(), task.dense_model()
    structures = vlprune.discover(teacher).structures
    teacher.load_state_dict(model.state_dict())
    plain = task.objective(model)(**batch)["loss"]
    for term in ("logits", "features"):
        taught = Taught(task.objective(model), model, teacher, {term: 10.0}, structures)
        assert float(taught(**batch)["loss"]) == pytest.approx(float(plain), abs=1e-4)


def test_real_formats_need_their_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"also needs questions, annotations, images.*data\.train"):
        VqaTask(SMALL, DataSpec(format="vqav2"), tmp_path)
    with pytest.raises(DataError, match="also needs captions, images"):
        RetrievalTask(SMALL, DataSpec(format="coco-captions"), tmp_path)
    with pytest.raises(RecipeError, match="Did you mean 'easy-vqa'"):
        VqaTask(SMALL, DataSpec(format="easyvqa"), tmp_path)
    with pytest.raises(RecipeError, match="Did you mean 'karpathy'"):
        RetrievalTask(SMALL, DataSpec(format="karpaty"), tmp_path)


def test_vqav2_and_karpathy_through_the_tasks(tmp_path: Path) -> None:
    from vlprune.data.shapes.write import write_shapes

    root = write_shapes(tmp_path / "s", train=6, test=4)
    notes = root / "annotations"
    part = {
        split: {
            "questions": str(notes / f"questions_{sub}.json"),
            "annotations": str(notes / f"answers_{sub}.json"),
            "images": str(root / "images"),
        }
        for split, sub in (("train", "train2014"), ("test", "val2014"))
    }
    vqa = VqaTask(SMALL, DataSpec("vqav2", train=part["train"], test=part["test"]), tmp_path)
    assert vqa.train
    assert vqa.test
    karpathy = {
        split: {
            "split_file": str(notes / "dataset_shapes.json"), "images": str(root / "images"),
            "split": split,
        }
        for split in ("train", "test")
    }  # fmt: skip
    spec = DataSpec("karpathy", train=karpathy["train"], test=karpathy["test"], test_items=3)
    assert len(RetrievalTask(SMALL, spec, tmp_path).test) == 3


def test_real_captions_train_a_clip(real_data: Path, tmp_path: Path) -> None:
    part = {
        split: {
            "captions": str(real_data / "coco-cc" / "annotations" / f"captions_{name}2017.json"),
            "images": str(real_data / "coco-cc" / f"{name}2017"),
        }
        for split, name in (("train", "train"), ("test", "val"))
    }
    task = RetrievalTask(
        SMALL, DataSpec("coco-captions", train=part["train"], test=part["test"]), tmp_path
    )
    model = task.new_model()
    batch = task.collate(list(task.train[:4]), random.Random(0))
    assert task.objective(model)(**batch)["loss"].isfinite()
    assert task.evaluate(model, lambda n, note="": None)["image_to_text_r10"] > 0
