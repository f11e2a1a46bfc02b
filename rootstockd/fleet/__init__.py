"""All models and all devices: which is where, for how long, and what it takes there."""
