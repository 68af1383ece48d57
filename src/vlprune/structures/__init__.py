"""Descriptions, plans and records of models, as plain values."""
