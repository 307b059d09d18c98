"""Records for training: typed examples, named data sets and their licences, the user's own files, the hub."""
