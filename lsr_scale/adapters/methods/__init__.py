"""One method a file: every file here is imported, and registers a method or maps the options of PEFT's own."""
