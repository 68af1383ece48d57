"""What a unit costs, and which units a budget pays for."""
