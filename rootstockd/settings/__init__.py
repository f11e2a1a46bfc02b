"""What the daemon is told: settings, the files they are in, and where each comes from."""
