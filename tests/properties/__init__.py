"""Properties that hold for any sizes, lengths, ranks and numbers of processes, tried with hypothesis."""
