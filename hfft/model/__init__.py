"""One pretrained network: its checkpoint, its parts, what of it is frozen and what is attached."""
