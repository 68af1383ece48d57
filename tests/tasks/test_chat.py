"""The task chat: what is read, which tokens are learnt, and whole recipes on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import chats
import vlprune
from chats import CHATS, ENDS
from vlprune.commands.pipeline.compress import compress
from vlprune.data.conversations import Conversation, Turn, read_llava, read_messages
from vlprune.data.files import Left
from vlprune.errors import DataError, RecipeError, UnsupportedError
from vlprune.recipe.spec import DataSpec, LoraSpec, ModelSpec, Recipe, Training
from vlprune.tasks import ChatTask
from vlprune.tasks.chat_metric import relaxed_match
from vlprune.tasks.prompts import Prompts
from vlprune.tasks.suffixes import SuffixPrompts, takes_suffixes

CAT, DOG = Path("cat.png"), Path("dog.png")
ONE = (Turn("user", (CAT, "what is this?")), Turn("assistant", ("a cat",)))
MANY = (
    Turn("system", ("be kind",)),
    Turn("user", (CAT, DOG, "how many?")),
    Turn("assistant", ("two",)),
    Turn("user", ("a dog?",)),
    Turn("assistant", ("no, one\ncat",)),
)
LATER = (
    *ONE,
    Turn("user", ("and", DOG, "?")),
    Turn("assistant", ("two dogs",)),
    Turn("user", ("no?",)),
    Turn("assistant", ("yes",)),
)
BARE = (Turn("user", ("how many?",)), Turn("assistant", ("three",)))


def opened(path: Path) -> Image.Image:
    return Image.new("RGB", (60, 40) if path == CAT else (30, 50), (200, 10, 10))


def write(path: Path, body: Any) -> Path:
    path.write_text(json.dumps(body))
    return path


# -- readers -------------------------------------------------------------------------------


def test_llava_files_by_hand(tmp_path: Path) -> None:
    said = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
    ]
    entries = [
        {"id": "a", "image": "x/1.jpg", "conversations": said},
        {"id": 7, "image": "2.jpg", "conversations": [said[2], said[1]]},
        {"conversations": [{"from": "system", "value": "Be kind."}, said[2], said[1]]},
        {"id": "m", "image": ["1.jpg", "2.jpg"], "conversations": [
            {"from": "human", "value": "From <image> to <image>?"}, said[1]]},
        {"id": "n", "conversations": [said[2]]},
        {"id": "o", "conversations": [said[2], {"from": "gpt", "value": " "}]},
    ]  # fmt: skip
    left = Left()
    a, second, third, m = read_llava(write(tmp_path / "a.json", entries), "pics", left)
    first, other = Path("pics/x/1.jpg"), Path("pics/2.jpg")
    assert a == Conversation("a", (Turn("user", (first, "What is it?")),
                                   Turn("assistant", ("A cat.",))))  # fmt: skip
    assert second.turns[0].parts == (other, "Sure?")
    assert [turn.role for turn in third.turns] == ["system", "user", "assistant"]
    assert third.id == 2
    assert third.images == ()
    assert m.turns[0].parts == ("From", Path("pics/1.jpg"), "to", other, "?")
    assert left == {"conversations without an answer": 1, "conversations with a blank turn": 1}


def test_messages_by_hand(tmp_path: Path) -> None:
    shown = {"type": "image"}
    asked = {"role": "user", "content": [shown, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": "A cat."}
    lines = [
        {"messages": [asked, answer], "images": ["1.jpg"]},
        {"messages": [{"role": "user", "content": "What?"}, answer], "images": ["1.jpg", "2.jpg"]},
        {"messages": [{"role": "user", "content": [{**shown, "path": "3.jpg"}]}, answer]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second, third = read_messages(path, "pics")
    one, two = Path("pics/1.jpg"), Path("pics/2.jpg")
    assert first.turns == (Turn("user", (one, "What?")), Turn("assistant", ("A cat.",)))
    assert second.turns[0].parts == (one, two, "What?")
    assert third.images == (Path("pics/3.jpg"),)


@pytest.mark.parametrize(
    ("said", "image", "why"),
    [
        ([("human", "<image> a"), ("gpt", "b")], None, r"1 times <image> .* 0 pictures"),
        ([("human", "<image> a"), ("gpt", "b")], ["1.jpg", "2.jpg"], "2 pictures"),
        ([("human", "a"), ("human", "b"), ("gpt", "c")], None, "turn 2 is of the user"),
        ([("gpt", "a")], None, "turn 1 is of the assistant"),
        ([("robot", "a")], None, "'from' must be one of human"),
        ([("human", "a"), ("gpt", "<image> b")], "1.jpg", "only the user can"),
        ([("human", "a"), ("gpt", "b")], "../1.jpg", "'image' must be a path inside"),
        ([("human", "a"), ("gpt", "b")], ["/etc/x"], "must be a path inside"),
    ],
)
def test_wrong_llava_entries_are_named(tmp_path: Path, said: Any, image: Any, why: str) -> None:
    turns = [{"from": who, "value": text} for who, text in said]
    entry = {"id": 3, "conversations": turns, **({} if image is None else {"image": image})}
    with pytest.raises(DataError, match=why) as error:
        read_llava(write(tmp_path / "a.json", [entry]), "pics")
    assert "a.json" in str(error.value)


def test_pictures_that_no_message_shows(tmp_path: Path) -> None:
    part = {"type": "image", "path": "1.jpg"}
    entry = {
        "messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "b"}],
        "images": ["2.jpg"],
    }
    with pytest.raises(DataError, match="1 pictures in 'images' that no part"):
        read_messages(write(tmp_path / "a.json", [entry]), "pics")
    entry["messages"][0]["content"] = [{"type": "image"}, {"type": "image"}]  # type: ignore[index]
    with pytest.raises(DataError, match="a picture without a name"):
        read_messages(write(tmp_path / "a.json", [entry]), "pics")


# -- the tokens that are learnt --------------------------------------------------------------


@pytest.fixture(scope="module", params=CHATS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name = request.param
    torch.manual_seed(0)
    model, processor = CHATS[name](tmp_path_factory.mktemp("chat") / "source")
    return name, model.eval(), processor


@pytest.mark.parametrize(
    "conversations",
    [[ONE], [MANY], [LATER], [BARE], [ONE, MANY, LATER], [ONE, BARE]],
    ids=["one", "many", "later", "bare", "together", "mixed"],
)
def test_the_answers_are_learnt_and_nothing_else(family: Any, conversations: Any) -> None:
    name, _, processor = family
    batch = Prompts(processor).answered(conversations, opened)
    for turns, labels, ids in zip(conversations, batch["labels"], batch["input_ids"], strict=True):
        learnt = labels != -100
        assert ids[learnt].equal(labels[learnt])
        said = processor.tokenizer.decode(labels[learnt])
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        assert [one.strip() for one in said.split(ENDS[name])] == [*answers, ""]


def test_a_model_answers_what_it_is_asked(family: Any) -> None:
    """The prompt of a generation is the beginning of what is learnt."""
    _, model, processor = family
    prompts = Prompts(processor)
    for turns in (ONE, MANY, LATER):
        asked = prompts.asked([turns[:-1]], opened)
        learnt = prompts.answered([turns], opened)
        length = asked["input_ids"].shape[1]
        assert learnt["input_ids"][0, :length].equal(asked["input_ids"][0])
        first = learnt["labels"][0].ne(-100).nonzero()[-1] - length
        assert first >= 0
    both = prompts.asked([ONE[:-1], MANY[:-1]], opened)
    tokens = model.generate(**both, max_new_tokens=3, do_sample=False, **prompts.ends(model))
    alone = prompts.asked([ONE[:-1]], opened)
    own = model.generate(**alone, max_new_tokens=3, do_sample=False, **prompts.ends(model))
    assert prompts.texts(tokens[:1, both["input_ids"].shape[1] :]) == prompts.texts(
        own[:, alone["input_ids"].shape[1] :]
    )


def test_an_answer_that_is_the_suffix_of_a_prompt(tmp_path: Path) -> None:
    """PaliGemma: the prompt is read in both directions, and its processor ends the answer."""
    model, processor = chats.paligemma(tmp_path)
    assert takes_suffixes(processor)
    assert not takes_suffixes(CHATS["llava"](tmp_path)[1])
    prompts = SuffixPrompts(processor)
    batch = prompts.answered([ONE, MANY, LATER], opened)
    decode = processor.tokenizer.decode
    for turns, ids, labels in zip(
        (ONE, MANY, LATER), batch["input_ids"], batch["labels"], strict=True
    ):
        assert decode(labels[labels != -100]) == f"{turns[-1].text}</s>"
        said = decode(ids, skip_special_tokens=True).split("\n", len(turns) - 1)
        texts = ["".join(part for part in t.parts if isinstance(part, str)) for t in turns]
        assert [one.strip() for one in said] == texts
    asked = prompts.asked([ONE[:-1]], opened)
    length = asked["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].equal(asked["input_ids"][0])
    assert not asked["token_type_ids"].any()
    assert "labels" not in asked
    loss = model.eval()(**batch).loss
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    place = batch["labels"][1].ne(-100).nonzero()[-1]
    other["input_ids"][1, place] = 5  # the end of an answer, which nothing before it sees
    before, after = (model(**one).logits[1, : int(place)] for one in (batch, other))
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.isfinite(loss)
    longest = batch["attention_mask"].sum(1).tolist()[2]
    shorter = SuffixPrompts(processor, longest=longest - 1).answered([LATER], opened)
    assert decode(shorter["labels"][shorter["labels"] != -100]) == f"{LATER[-3].text}</s>"


def test_long_conversations_lose_their_last_turns(family: Any) -> None:
    name, _, processor = family
    whole = Prompts(processor).answered([LATER], opened)["input_ids"].shape[1]
    batch = Prompts(processor, longest=whole - 1).answered([LATER, ONE], opened)
    learnt = batch["labels"][0]
    said = processor.tokenizer.decode(learnt[learnt != -100]).split(ENDS[name])
    assert [one.strip() for one in said] == ["a cat", "two dogs", ""]
    with pytest.raises(DataError, match=r"'a cat'\), more than options.longest=5: raise it"):
        Prompts(processor, longest=5).answered([LATER], opened)


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    _, processor = CHATS["llava"](tmp_path)
    lost = tmp_path / "lost.jinja"
    lost.write_text("{% for message in messages %}{{ message['role'] }}{% endfor %}")
    with pytest.raises(RecipeError, match="does not keep the answers in their places"):
        Prompts(processor, str(lost))
    lost.write_text("{{ raise_exception('no system') }}")
    with pytest.raises(RecipeError, match="refuses a conversation of user, assistant"):
        Prompts(processor, str(lost))
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="has no chat template: give the file of one"):
        Prompts(processor)
    with pytest.raises(RecipeError, match="nowhere"):
        Prompts(processor, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("said", "answer", "same"),
    [
        ("The cat.", "cat", 1.0),
        ("two", "2", 1.0),
        ("105", "100", 1.0),
        ("94.9", "100", 0.0),
        ("1,050", "1000", 1.0),
        ("50%", "0.51", 1.0),
        ("0.1", "0", 0.0),
        ("nan", "1", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_relaxed_match_by_hand(said: str, answer: str, same: float) -> None:
    assert relaxed_match(said, answer) == same


# -- processors for pictures and videos ----------------------------------------------------------


def test_a_processor_without_its_part_for_videos_is_saved_whole(tmp_path: Path) -> None:
    if transformers.utils.is_torchvision_available():
        pytest.skip("torchvision is installed: the whole processor is opened")
    _, processor = CHATS["qwen2_vl"](tmp_path / "source")
    processor.save_pretrained(tmp_path / "saved")
    name = "video_preprocessor_config.json"
    assert json.loads((tmp_path / "saved" / name).read_text()) == json.loads(
        (tmp_path / "source" / name).read_text()
    )
    body = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert body["processor_class"] == "Qwen2VLProcessor"


# -- the task --------------------------------------------------------------------------------------

SECOND = ("idefics3", "gemma3", "internvl", "qwen2_vl")
"""Families whose whole recipe waits for `make slow`: they differ in the tokens that are learnt."""
SHORT = Training(steps=2, batch_size=4, learning_rate=1e-3)
FEW = DataSpec(train_items=8, test_items=2)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in CHATS if name not in SECOND),
        "paligemma",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SECOND),
    ],
)
def test_a_recipe_for_each_family(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = chats.paligemma if name == "paligemma" else CHATS[name]
    model, processor = make(tmp_path / "source")
    vlprune.save(model, tmp_path / "dense", processor=processor)
    recipe = Recipe(
        task="chat", budget={"params": 0.8}, method={"name": "upop"},
        model=ModelSpec(path=str(tmp_path / "dense")), data=FEW, search=SHORT, retrain=SHORT,
        teacher={"logits": 1.0, "features": 1.0}, options={"new_tokens": 2}, threads=1,
    )  # fmt: skip
    report = compress(recipe, tmp_path / "small")
    assert report["budget"]["reached"] <= 0.8
    assert report["verified"]
    assert {*report["metrics"]["retrained"]} == {
        "token_accuracy", "loss", "exact_match", "relaxed_match"
    }  # fmt: skip
    again = type(model).from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in again.parameters()) == report["params"]["after"]


@pytest.mark.parametrize("merge", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adapters_recover_the_small_model(merge: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    sizes = ModelSpec(width=32, heads=2, vision_layers=1, text_layers=1, image_size=32)
    recipe = Recipe(
        task="chat", budget={"params": 0.9}, model=sizes, data=FEW, train=SHORT, threads=1,
        retrain=Training(
            steps=3, batch_size=4, learning_rate=1e-2, lora=LoraSpec(rank=2, merge=merge)
        ),
    )  # fmt: skip
    report = compress(recipe, tmp_path / "small")
    task = ChatTask(sizes, FEW, tmp_path / "small" / "data")
    small: Any = vlprune.load(tmp_path / "small")
    if not merge:
        cut = task.evaluate(small, lambda done: None)
        assert cut["loss"] == pytest.approx(report["metrics"]["cut"]["loss"], rel=1e-5)
        small = peft.PeftModel.from_pretrained(small, tmp_path / "small" / "adapter")
    assert (tmp_path / "small" / "adapter").exists() != merge
    found = task.evaluate(small, lambda done: None)
    assert found["loss"] == pytest.approx(report["metrics"]["retrained"]["loss"], rel=1e-4)
    assert abs(found["loss"] - report["metrics"]["cut"]["loss"]) > 1e-3
    assert (
        sum(p.numel() for p in vlprune.load(tmp_path / "small").parameters())
        == (report["params"]["after"])
    )


def test_adapters_are_for_retraining_only() -> None:
    lora = Training(steps=1, lora=LoraSpec(rank=2))
    with pytest.raises(RecipeError, match=r"search.lora.rank must be 0: only the small model"):
        Recipe(task="chat", budget={"params": 0.9}, search=lora)
    with pytest.raises(RecipeError, match=r"ema must be 0 with lora"):
        Training(steps=1, ema=0.9, lora=LoraSpec(rank=2))


def test_adapters_are_refused_where_layers_share(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from vlprune.testing import build
    from vlprune.training.adapters import Adapters

    model: Any = build("clip").model
    with pytest.raises(RecipeError, match="no linear layer's name matches 'nothing'"):
        Adapters(model, LoraSpec(rank=2, targets=("nothing",)), 0)
    description = vlprune.discover(model)
    text = [s for s in description if s.tower == "text" and s.kind == "ffn"]
    plan = vlprune.Plan(share={text[1].name: (text[0].name, range(2))})
    shared = vlprune.rewrite(model, description, plan)
    with pytest.raises(UnsupportedError, match="layers of this model share weights"):
        Adapters(shared, LoraSpec(rank=2), 0)
