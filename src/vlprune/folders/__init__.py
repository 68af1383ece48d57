"""What is on disk: a model saved whole or not at all, loaded without code of its own."""
