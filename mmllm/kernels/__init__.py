"""Matrix products and whole passes of our own, each with the same formula in torch beside it."""
