"""What runs inside an engine's environment: the standard library, numpy and that engine, nothing else of rootstockd."""
