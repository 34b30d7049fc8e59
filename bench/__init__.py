"""Side-by-side measurements, each a command that appends records and prints a table."""
