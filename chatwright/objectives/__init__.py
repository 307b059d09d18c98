"""Losses and estimators: pure functions of tensors."""
