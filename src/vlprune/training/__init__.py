"""One compression while a model learns."""
