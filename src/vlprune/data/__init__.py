"""Readers for the formats of published data sets, and a generator that writes these formats."""
