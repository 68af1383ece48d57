"""Recipes and their options, checked before anything runs."""
