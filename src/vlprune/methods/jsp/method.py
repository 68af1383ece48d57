"""The JSP method, with the meaning of its options."""

from __future__ import annotations

from typing import ClassVar

from ...recipe.options import JspOptions
from ..base import Method, Problem, Search
from .search import JspSearch

__all__ = ["JSP"]


class JSP(JspOptions, Method):
    """Joint share and prune (ICLR 2023, openreview UMERaIHMwB3), as far as it is public; see below.

    Every unit of the towers ``base`` and ``other`` has a number m, 1 where the unit stays. A unit
    of ``other`` may take its weights from the layer of ``base`` at equal depth (``"cross"``), a
    unit of ``base`` from the first layer of its block of ``block`` layers (``"block"``). A
    hypernetwork makes all these vectors, so it sees layers and modalities together; it is trained
    in turn with the weights on held-out batches: task loss plus ``budget_weight`` times
    log(max(P, target) / target), P the cost that the vectors leave. The weights are trained whole,
    and drawn to the wanted structure: ``alignment`` times their distance from that structure
    (:func:`vlprune.methods.vectors.alignment`) joins the loss, and once the structure is frozen the
    distance also fades on UPop's schedule, to exactly 0 at the end. Then the cut removes and shares
    units for real, which changes no output.

    Stated in the source: sharing across backbones and inside blocks, pruning in both, one
    hypernetwork, the alignment term, training in turn. Not from the source, because no code is
    public: every number here, and the form of the network and of the losses, which stay close to
    the authors' sibling works.

    ``families`` switches parts off for comparison. ``group_size`` units decide together.
    ``warmup``, ``align`` and ``freeze`` are points of progress: the hypernetwork learns from
    ``warmup`` to ``freeze``, weights are aligned from ``align`` on. There are at least ``turns``
    turns, as far as there are weight steps, and they are at most ``every`` weight steps apart.
    ``match`` pairs units by the cosine of their weights (Hungarian matching) instead of by number.
    ``mismatch="skip"`` shares only where two layers are alike, ``"error"`` raises UnsupportedError
    where they are not.

    Needs ``held_out`` batches in the Compressor (a run of a recipe splits them off by itself).
    """

    uses_held_out: ClassVar[bool] = True

    def start(self, problem: Problem) -> Search:
        """A search that keeps everything at first.

        Raises BudgetError if the budget cannot be reached, is a latency, or comes with groups of
        equal width; UnsupportedError if a tower is missing or its layers cannot share as asked.
        """
        return JspSearch(self, problem)
