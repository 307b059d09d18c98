"""Memory and time before a run starts."""
