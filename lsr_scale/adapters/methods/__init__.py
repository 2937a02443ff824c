"""One method a file, nothing else; every file here that registers a method is found by importing it."""
