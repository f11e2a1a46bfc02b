"""Python environments for workers, one for each engine's needs: specified, built with uv, found, verified, moved."""
