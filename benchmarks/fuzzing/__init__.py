"""The parts of ``benchmarks/fuzz.py``: damage, surfaces, and the cell in which a case runs."""
