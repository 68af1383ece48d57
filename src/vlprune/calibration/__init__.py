"""Compression without training: statistics of calibration batches, rotate, fold."""
