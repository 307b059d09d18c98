"""Running a server: access control, logs and metrics, and how it starts, drains and ends."""
