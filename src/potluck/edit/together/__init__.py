"""One edit of a model by many: sums of statistics travel, edits do not (CollabEdit, arXiv 2410.09508)."""
