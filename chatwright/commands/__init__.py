"""Verbs that are not stages: one file each; the file's name is the verb."""
