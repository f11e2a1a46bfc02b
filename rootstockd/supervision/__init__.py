"""One model kept warm on one device: its worker, its queue, its batches, and what is done when they fail."""
