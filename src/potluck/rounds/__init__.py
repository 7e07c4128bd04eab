"""The loop: the coordinator's side of a run."""
