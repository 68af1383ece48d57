"""Readers for on-disk formats as the world has them, and a generator that writes them."""
