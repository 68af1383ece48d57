"""Models on disk: saved completely or not at all, and loaded without running their own code."""
