"""What the machine has and knows: GPUs, sockets, descriptors, and who is at the other end of a connection."""
