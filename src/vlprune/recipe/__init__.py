"""What a user asks for, checked before anything runs."""
