"""Drivers: how they come in, who they are, what they may take, and the way of their structures."""
