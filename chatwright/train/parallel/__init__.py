"""One model on many processes."""
