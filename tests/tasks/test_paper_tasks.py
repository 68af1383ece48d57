"""The tasks of the UPop paper: their losses, metrics and formats."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlprune.data.pairs import read_nlvr1, read_nlvr2
from vlprune.data.pictures import IGNORE, open_mask, read_ade20k, read_image_folder
from vlprune.data.questions import read_visual_genome
from vlprune.errors import DataError, RecipeError, UnsupportedError
from vlprune.models import BlipForVisualReasoning, BlipNlvrConfig
from vlprune.recipe.spec import DataSpec, ModelSpec
from vlprune.tasks import (
    BlipRetrievalTask,
    CaptioningTask,
    ClassificationTask,
    ReasoningTask,
    SegmentationTask,
    VqaTask,
)
from vlprune.tasks.caption_metric import caption_scores
from vlprune.tasks.classification import SoftTargets
from vlprune.tasks.segmentation import windows

SMALL = ModelSpec(width=16, heads=2, vision_layers=1, text_layers=1, image_size=32, patch_size=16)
FEW = DataSpec(format="shapes", train_items=6, test_items=4)


# -- what is read --------------------------------------------------------------------------


def test_nlvr2_lines_name_their_images(tmp_path: Path) -> None:
    line = {"identifier": "train-7-1-0", "sentence": "Two dogs.", "label": "True", "directory": 7}
    (tmp_path / "train.json").write_text(json.dumps(line) + "\n")
    (tmp_path / "images" / "7").mkdir(parents=True)
    (found,) = read_nlvr2(tmp_path / "train.json", tmp_path / "images")
    assert [p.name for p in found.images] == ["train-7-1-img0.png", "train-7-1-img1.png"]
    assert found.images[0].parent.name == "7"
    assert found.truth
    (tmp_path / "bad.json").write_text(json.dumps({**line, "label": "maybe"}) + "\n")
    with pytest.raises(DataError, match="line 1: 'label' must be true or false"):
        read_nlvr2(tmp_path / "bad.json", tmp_path)


def test_real_nlvr1_splits_by_sentence(real_data: Path) -> None:
    train, test = (read_nlvr1(real_data / "nlvr1", split) for split in ("train", "test"))
    assert len(train) + len(test) == 989 + 985
    assert not {s.text for s in train} & {s.text for s in test}
    assert all(s.images[0].exists() for s in train[::50] + test)


def test_visual_genome_answers_look_like_vqas(tmp_path: Path) -> None:
    url = "https://x.org/VG_100K_2/5.jpg"
    (tmp_path / "data.json").write_text(json.dumps([{"image_id": 5, "url": url}]))
    asked = {"qa_id": 9, "image_id": 5, "question": "What is it?", "answer": "A Dog."}
    (tmp_path / "qa.json").write_text(json.dumps([{"id": 5, "qas": [asked]}]))
    (found,) = read_visual_genome(tmp_path / "qa.json", tmp_path / "data.json", tmp_path)
    assert found.answers == ("a dog",)
    assert found.weight == 0.2
    assert found.image == tmp_path / "VG_100K_2" / "5.jpg"
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(DataError, match="does not list image 5"):
        read_visual_genome(tmp_path / "qa.json", tmp_path / "data.json", tmp_path)


def test_ade20k_masks_count_from_zero(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(DataError, match="has no mask"):
        read_ade20k(tmp_path / "images", tmp_path / "masks")
    values = np.array([[0, 1, 150], [2, 0, 1]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "masks" / "a.png")
    (item,) = read_ade20k(tmp_path / "images", tmp_path / "masks")
    assert open_mask(item.mask).tolist() == [[IGNORE, 0, 149], [1, IGNORE, 0]]
    Image.new("RGB", (3, 2)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match="has colours"):
        open_mask(item.mask)


def test_an_image_folder_is_named_by_its_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        read_image_folder(tmp_path / "no")
    with pytest.raises(DataError, match="named after their classes"):
        read_image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "1.JPEG")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    assert [item.label for item in read_image_folder(tmp_path)] == ["cat"]


# -- what is learnt ------------------------------------------------------------------------


def test_the_two_images_of_a_statement_are_told_apart() -> None:
    task_model = _reasoner()
    first, second = torch.randn(2, 1, 3, 32, 32)
    ids = torch.tensor([[1, 4, 5, 3]])
    one = task_model(pixel_values=torch.stack([first, second], 1), input_ids=ids).logits
    two = task_model(pixel_values=torch.stack([second, first], 1), input_ids=ids).logits
    assert not torch.allclose(one, two, atol=1e-6)


def _reasoner() -> Any:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "vocab_size": 20, "encoder_hidden_size": 16,
            "bos_token_id": 1, "sep_token_id": 3}  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32, "image_size": 32, "patch_size": 16}  # fmt: skip
    config = BlipNlvrConfig(text_config=text, vision_config=vision, merge_from_layer=1,
                            initializer_range=0.3)  # fmt: skip
    model = BlipForVisualReasoning(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_blip_becomes_a_reasoner_that_reads_both_images_alike(tmp_path: Path) -> None:
    task = BlipRetrievalTask(SMALL, FEW, tmp_path)
    torch.manual_seed(0)
    blip = task.new_model().eval()
    blip.save_pretrained(tmp_path / "blip")
    task.processor.save_pretrained(tmp_path / "blip")
    spec = ModelSpec(path=str(tmp_path / "blip"))
    model = ReasoningTask(spec, FEW, tmp_path / "r").dense_model().eval()
    image = torch.randn(1, 3, 32, 32)
    ids = torch.tensor([[1, 4, 5, 3]])
    states = blip.vision_model(image).last_hidden_state
    want = blip.text_encoder(input_ids=ids, encoder_hidden_states=states).last_hidden_state
    pair = torch.stack([states, states], 1)
    got = model.text_encoder(input_ids=ids, encoder_hidden_states=pair).last_hidden_state
    assert torch.allclose(got, want, atol=1e-5)  # the same image twice is the image once


def test_captions_are_learnt_after_the_prompt_only(tmp_path: Path) -> None:
    task = CaptioningTask(SMALL, FEW, tmp_path)
    batch = task.collate(list(task.train[:3]), random.Random(0))
    tokenizer = task.processor.tokenizer
    prompt = tokenizer("a picture of")["input_ids"][:-1]
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert ids[: len(prompt)].tolist() == prompt
        assert (labels[: len(prompt)] == -100).all()
        said = labels[labels >= 0]
        assert said[-1] == tokenizer.eos_token_id
        assert said.tolist() == ids[len(prompt) : len(prompt) + len(said)].tolist()


def test_caption_scores_know_a_perfect_caption() -> None:
    pytest.importorskip("pycocoevalcap", reason="captions are scored by pycocoevalcap")
    truths = [("a red circle and a big square", "a circle and a square"),
              ("two blue triangles in a row", "blue triangles standing there")]  # fmt: skip
    perfect = caption_scores([t[0] for t in truths], truths)
    wrong = caption_scores([truths[1][0], truths[0][0]], truths)
    assert perfect["bleu_4"] == pytest.approx(1, abs=1e-6)
    assert perfect["cider"] > 1 > wrong["cider"] >= 0


def test_mixed_labels_by_hand() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, pixel_values: Any) -> Any:
            class Output:
                logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])

            return Output

    objective = SoftTargets(Fixed(), 3, 0.3, None)
    labels, share = torch.tensor([0, 1]), torch.tensor(0.75)
    loss = objective(torch.zeros(2, 3, 1, 1), labels, labels.flip(0), share)["loss"]
    # 0.7 x (0.75 of its own, 0.25 of the other) + 0.1 everywhere
    want = torch.tensor([[0.625, 0.275, 0.1], [0.275, 0.625, 0.1]])
    log = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).log_softmax(1)
    assert loss == pytest.approx(float(-(want * log).sum(1).mean()))


def test_a_distillation_token_learns_from_its_teacher(tmp_path: Path) -> None:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    data = DataSpec(format="shapes", train_items=6, test_items=2, folder=str(tmp_path / "s"))
    plain = ClassificationTask(SMALL, data, tmp_path)
    teacher = plain.new_model()
    plain.processor.save_pretrained(tmp_path / "teacher")
    teacher.save_pretrained(tmp_path / "teacher")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
             "intermediate_size": 32, "image_size": 32, "patch_size": 16}  # fmt: skip
    student = DeiTForImageClassificationWithTeacher(
        DeiTConfig(**sizes, num_labels=len(plain.classes))
    )
    options = {"distill_from": str(tmp_path / "teacher"), "mixup": 0.0, "smoothing": 0.0}
    task = ClassificationTask(SMALL, data, tmp_path, options)
    batch = task.collate(list(task.train[:4]), random.Random(0))
    loss = task.objective(student)(**batch)["loss"]
    output = student(batch["pixel_values"])
    decided = teacher.eval()(batch["pixel_values"]).logits.argmax(1)
    want = F.cross_entropy(output.cls_logits, batch["labels"]) + F.cross_entropy(
        output.distillation_logits, decided
    )
    assert float(loss) == pytest.approx(float(want) / 2)
    with pytest.raises(UnsupportedError, match="distillation token"):
        task.objective(plain.new_model())


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 9), (10, 7)])
def test_windows_cover_everything_and_stay_inside(height: int, width: int) -> None:
    seen = np.zeros((height, width), dtype=int)
    for y, x in windows(height, width, 4):
        assert 0 <= y <= height - 4
        assert 0 <= x <= width - 4
        seen[y : y + 4, x : x + 4] += 1
    assert (seen > 0).all()


def test_miou_over_the_whole_set_by_hand(tmp_path: Path) -> None:
    task = SegmentationTask(SMALL, FEW, tmp_path)

    class Always(torch.nn.Module):  # says "background" (class 0) everywhere
        device = torch.device("cpu")
        config = type("Config", (), {"num_labels": 4})

        def forward(self, pixel_values: Any) -> Any:
            logits = torch.zeros(len(pixel_values), 4, 2, 2)
            logits[:, 0] = 1
            return type("Output", (), {"logits": logits})

    truth = np.concatenate([open_mask(item.mask).ravel() for item in task.test])
    found = task.evaluate(Always(), lambda n: None)
    classes = len(np.unique(truth))
    assert found["miou"] == pytest.approx(float((truth == 0).mean()) / classes, abs=1e-6)


def test_crops_and_labels_stay_together(tmp_path: Path) -> None:
    """Whatever the crop, a pixel's label is that of its colour."""
    image, mask = tmp_path / "images", tmp_path / "masks"
    for folder in (image, mask):
        folder.mkdir()
    label = np.zeros((40, 60), dtype=np.uint8)
    label[:, :30], label[:, 30:] = 1, 2
    Image.fromarray(label).save(mask / "a.png")
    Image.fromarray(np.stack([(label - 1) * 255] * 3, axis=2)).save(image / "a.png")
    parts = {"images": str(image), "masks": str(mask)}
    task = SegmentationTask(SMALL, DataSpec("ade20k", train=parts, test=parts), tmp_path)
    for seed in range(20):
        batch = task.collate(list(task.train), random.Random(seed))
        known = batch["labels"] != IGNORE
        white = batch["pixel_values"][:, 0] > 0
        agree = (white == (batch["labels"] == 1))[known].float().mean()
        assert agree > 0.9  # but for blurred borders


# -- retrieval -----------------------------------------------------------------------------


def test_reranking_uses_the_matching_head(tmp_path: Path) -> None:
    task = BlipRetrievalTask(SMALL, FEW, tmp_path)
    torch.manual_seed(0)
    model = task.new_model()
    plain = BlipRetrievalTask(SMALL, FEW, tmp_path, {"rerank": 1})
    captions = sum(len(item.captions) for item in task.test)
    scores = torch.randn(len(task.test), captions)
    by_image, by_text = task._reranked(model.eval(), scores)
    one, _ = plain._reranked(model, scores)
    assert (one.argmax(1) == scores.argmax(1)).all()  # one candidate: nothing to reorder
    item = task.test[0]
    states = model.vision_model(task.pixels([item.image])).last_hidden_state
    ids = task.words([item.captions[0]])
    read = model.text_encoder(**ids, encoder_hidden_states=states).last_hidden_state
    want = scores[0, 0] + model.itm_head(read[:, 0])[0, 1]
    assert float(by_image[0, 0]) == pytest.approx(float(want), abs=1e-4)
    assert by_text.shape == scores.shape


# -- options -------------------------------------------------------------------------------


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'mixup'"):
        ClassificationTask(SMALL, FEW, tmp_path, {"mixupp": 0.1})
    with pytest.raises(RecipeError, match="multi_scale must be true or false"):
        SegmentationTask(SMALL, FEW, tmp_path, {"multi_scale": 1})


def test_results_are_what_the_servers_take(tmp_path: Path) -> None:
    task = VqaTask(SMALL, FEW, tmp_path)
    rows = task.results(task.new_model())
    assert [row["question_id"] for row in rows] == [q.id for q in task.test]
    assert all(set(row) == {"question_id", "answer"} for row in rows)
    captions = CaptioningTask(SMALL, FEW, tmp_path)
    (row, *_) = captions.results(captions.new_model())
    assert set(row) == {"image_id", "caption"}
    assert row["image_id"] == 6  # the first test scene follows six for training
    classes = ClassificationTask(SMALL, FEW, tmp_path)
    (row, *_) = classes.results(classes.new_model())
    assert row["prediction"] in classes.classes


@pytest.mark.parametrize("family", [pytest.param("blip_nlvr", marks=pytest.mark.slow), "segmenter"])
def test_auto_classes_know_our_models(family: str, tmp_path: Path, python: Any) -> None:
    import vlprune
    from vlprune.testing import build

    model = build(family).model
    vlprune.save(vlprune.Compressor(model, vlprune.Magnitude(), {"params": 0.7}).finish(), tmp_path)
    code = (
        "import vlprune\nfrom transformers import AutoConfig, AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model).__name__, sum(p.numel() for p in model.parameters()))\n"
        f"assert type(model.config) is type(AutoConfig.from_pretrained({str(tmp_path)!r}))"
    )
    done = python.run(code)
    assert done.returncode == 0, done.stderr
    count = sum(p.numel() for p in model.parameters())
    assert done.stdout.split() == [type(model).__name__, str(count)]
