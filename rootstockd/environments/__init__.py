"""Python environments for workers, one for each engine's needs: specified, and found where they were built."""
