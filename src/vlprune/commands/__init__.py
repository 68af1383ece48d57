"""What a user types, and a run from a recipe to a folder."""
