"""TRL's SFTTrainer is a Trainer: a search in it, resumed and cut; adapters are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

import chats
import vlprune
from vlprune.errors import UnsupportedError
from vlprune.testing import build

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def make(folder: Path, **more: Any) -> tuple[Any, Any]:
    """An SFTTrainer of a tiny GPT-2 with a search in it, and the Compressor."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", *(f"w{i}" for i in range(5, 50))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    texts = [" ".join(f"w{5 + (7 * i + j) % 40}" for j in range(8)) for i in range(16)]
    model = build("gpt2").model
    compressor = vlprune.Compressor(model, vlprune.UPop(interval=1), {"params": 0.8})
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, save_steps=3, max_length=16, seed=3,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, processing_class=fast,
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in texts]),
        callbacks=[compressor.callback()], **more,
    )  # fmt: skip
    return trainer, compressor


def test_a_search_in_an_sft_trainer(tmp_path: Path) -> None:
    trainer, whole = make(tmp_path)
    trainer.train()
    assert whole.search.steps == 6
    trainer, resumed = make(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.plan() == whole.plan()
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert a.equal(b)
    resumed.finish()
    before = [p.detach().clone() for p in resumed.model.parameters()]
    trainer.train()
    assert not any(a.equal(b) for a, b in zip(resumed.model.parameters(), before, strict=True))


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_search_on_conversations_with_pictures(family: str, tmp_path: Path) -> None:
    """SFTTrainer prepares the pictures itself; the search sees the language and vision towers."""
    model, processor = getattr(chats, family)()
    pictures = [Image.new("RGB", (32, 24), (40 * n, 90, 200 - 40 * n)) for n in range(4)]
    rows = [
        {
            "images": [picture],
            "prompt": [{"role": "user", "content": "what is this"}],
            "completion": [{"role": "assistant", "content": "a cat" if n % 2 else "two dog"}],
        }
        for n, picture in enumerate(pictures)
    ]
    compressor = vlprune.Compressor(model, vlprune.UPop(interval=1), {"params": 0.9})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2,
        report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_steps=0,
        max_length=None,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, processing_class=processor,
        train_dataset=datasets.Dataset.from_list(rows), callbacks=[compressor.callback()],
    )  # fmt: skip
    trainer.train()
    assert compressor.search.steps == 4
    towers = {s.tower for s in compressor.structures if s.name in compressor.plan().keep}
    assert {"vision", "text"} <= towers
    dense = sum(p.numel() for p in model.parameters())
    small = compressor.finish()
    assert sum(p.numel() for p in small.parameters()) < 0.92 * dense
    vlprune.save(small, tmp_path / "small", processor=processor)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    for name, weight in small.state_dict().items():
        assert weight.equal(loaded.state_dict()[name]), name


def test_adapters_are_refused_before_the_first_step(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"])
    trainer, _ = make(tmp_path, peft_config=config)
    with pytest.raises(UnsupportedError, match=r"adapters.*merge_and_unload"):
        trainer.train()
    assert trainer.state.global_step == 0
