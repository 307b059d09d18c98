"""What people say to models and about them, kept in a database."""
