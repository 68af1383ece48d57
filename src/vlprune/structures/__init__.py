"""What a model is and what was decided about it, as plain values."""
