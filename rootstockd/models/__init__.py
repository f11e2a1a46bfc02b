"""What models there are, and where their weights lie."""
