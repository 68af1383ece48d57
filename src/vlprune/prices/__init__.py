"""Prices of units, and the choice of the units that a budget pays for."""
