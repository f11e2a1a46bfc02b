"""The dashboard: a page in a browser that shows what a daemon does, and the small server behind it."""
