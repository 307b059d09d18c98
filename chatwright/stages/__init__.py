"""Stages of the road: one file each; the file's name is the verb."""
