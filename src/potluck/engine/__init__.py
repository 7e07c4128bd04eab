"""Where participants run, and how tasks and contributions move."""
