"""Small backbones from scratch. Reading order: images, training, guide, folders, backbones."""
