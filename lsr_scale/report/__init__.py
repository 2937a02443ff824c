"""Pages of a run, and of several: one HTML file each, which needs no other file, no script and no network."""
