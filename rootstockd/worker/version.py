"""What daemon and worker must agree on: one may be upgraded on disk while the other runs."""

PROTOCOL = 4
"""Of the messages (`loop.py`) and of what a worker is started with; raised when either changes."""
SLOT_LAYOUT = 2
"""Of the shared memory (`slots.py`)."""
MESSAGE_SIZE = 64 * 1024
"""Bytes of a message, at most: either side would cut off what is longer."""
DISORDER = 69
"""Exit status of a worker whose device or library is in disorder; `EX_UNAVAILABLE` of sysexits.h."""
