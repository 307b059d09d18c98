"""Terminal chat, HTTP interface and pages."""
