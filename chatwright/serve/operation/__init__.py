"""Running a server: who may come in and from where, what is noted down, how it starts, drains and ends."""
