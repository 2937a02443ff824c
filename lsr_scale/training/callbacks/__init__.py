"""What watches a run while it trains: progress, signals, processes that died, memory, condition numbers."""
