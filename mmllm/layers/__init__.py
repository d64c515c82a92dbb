"""What replaces a linear layer: adapters, rounded weights, packed weights."""
