"""Making a model forget: losses, editing as unlearning, taking out a participant; and measuring it."""
