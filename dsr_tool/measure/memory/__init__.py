"""Memory of running and of training: computed, and measured in child processes."""
