"""Sharing: a unit that takes its weights from another structure's unit.

Before the cut, ``mixed`` runs a model as if it shared. The cut then makes it true with ``tie``:
each weight stores its own units only and is put together from these and the source's whenever a
forward pass asks for it, by ``torch.nn.utils.parametrize``. So the shared units are one parameter
in memory, on disk and for the optimizer, and gradients of all uses add up. ``materialize`` gives
up the memory for speed.
"""
