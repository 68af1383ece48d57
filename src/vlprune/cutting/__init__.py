"""Carrying out a plan: gates, shared weights, and the cut itself with its proof."""
