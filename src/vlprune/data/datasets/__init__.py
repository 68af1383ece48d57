"""Hugging Face datasets: opened, checked against what a task reads, and read row by row."""
