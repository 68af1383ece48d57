"""How fast a model is, and how much each part of it matters."""
