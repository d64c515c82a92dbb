"""`make demo`: a drawn world from nothing to answers. Reading order: world, backbones, demo, sheet."""
