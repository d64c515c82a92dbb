"""Matrix products of our own, each with the same formula in torch beside it."""
