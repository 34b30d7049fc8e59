"""When and in what order; each task is a command line."""
