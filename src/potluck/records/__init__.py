"""What a run leaves behind: events, checkpoints, reports."""
