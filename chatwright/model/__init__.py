"""Models: their shape, the decoder, its cache and heads."""
