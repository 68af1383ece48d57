"""Sharing: a unit that takes its weights from another structure's unit.

Before the cut, ``mixed`` runs a model as if it shared. The cut then makes the sharing real with
``tie``: each weight stores only its own units and is put together from these and the source's
whenever a forward pass reads it, through ``torch.nn.utils.parametrize``. So shared units are
stored once in memory, on disk and for the optimizer, and the gradients of all uses add up.
``materialize`` trades the memory saved for speed.
"""
