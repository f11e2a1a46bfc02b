"""Environments for workers come to be: built with uv, tried, verified, moved to other machines."""
