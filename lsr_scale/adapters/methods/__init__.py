"""One method a file, nothing else; every file here is imported, and registers its method."""
