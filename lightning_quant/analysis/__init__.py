"""Questions about a model, one module and one function each: coverage, SQNR, latency."""
