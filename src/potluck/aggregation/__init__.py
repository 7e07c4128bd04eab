"""Many to one: the streaming mean of contributions and the outer step on the shared state."""
