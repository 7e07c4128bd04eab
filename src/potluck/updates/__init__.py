"""The road of an update: what leaves a participant, and how it becomes bytes."""
