"""Reading and writing a buffer: accesses, polling and the fences behind them."""
