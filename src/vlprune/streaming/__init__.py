"""Models bigger than memory: opened without weights, cut and proved a few tensors at a time."""
