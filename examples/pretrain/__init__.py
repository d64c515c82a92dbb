"""Small backbones from scratch. Reading order: training, folders, backbones."""
