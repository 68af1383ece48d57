"""Caption metrics, computed by pycocoevalcap, the COCO caption evaluation."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import UnsupportedError

__all__ = ["caption_scores"]


def caption_scores(said: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr and BLEU-4 of one caption per image against all captions of that image.

    The keys are ``cider`` and ``bleu_4``, and ``spice`` where Java and the parser models that SPICE
    downloads once are present. COCO's tokenizer needs Java as well. Without Java a simple pattern
    splits the words, which changes the figures slightly, and ``words_split_without_java`` is 1.

    Raises UnsupportedError without pycocoevalcap.
    """
    if find_spec("pycocoevalcap") is None:
        raise UnsupportedError(
            "captions are scored by pycocoevalcap: pip install 'vlprune[captioning]'"
        )
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    java = shutil.which("java") is not None and _may_write_beside_it()
    answers = {n: [{"caption": text}] for n, text in enumerate(said)}
    wanted = {n: [{"caption": text} for text in texts] for n, texts in enumerate(truths)}
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results alone
        if java:
            from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

            tokenize = PTBTokenizer().tokenize
        else:
            tokenize = _plain_words
        candidates, references = tokenize(answers), tokenize(wanted)
        cider, _ = Cider().compute_score(references, candidates)
        bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
        scores = {"cider": float(cider), "bleu_4": float(bleu[3])}
        if java and _spice_is_ready():
            from pycocoevalcap.spice.spice import Spice

            scores["spice"] = float(Spice().compute_score(references, candidates)[0])
    if not java:
        scores["words_split_without_java"] = 1.0
    return scores


def _may_write_beside_it() -> bool:
    """Whether COCO's tokenizer may write in its package, where it puts its file for Java."""
    import pycocoevalcap

    return os.access(pycocoevalcap.__path__[0] + "/tokenizer", os.W_OK)


def _plain_words(captions: dict[int, list[dict[str, str]]]) -> dict[int, list[str]]:
    return {
        number: [" ".join(re.findall(r"[\w']+", entry["caption"].lower())) for entry in entries]
        for number, entries in captions.items()
    }


def _spice_is_ready() -> bool:
    import pycocoevalcap.spice as spice

    models = Path(spice.__path__[0]) / "lib"
    return any(models.glob("stanford-corenlp-*-models.jar"))
