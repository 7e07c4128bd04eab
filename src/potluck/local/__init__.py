"""What a participant does with its own data: local steps, evaluation, generation."""
