"""Training stages; a file name is a CLI verb."""
