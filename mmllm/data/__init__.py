"""From a data file to batches: records, images, tokens, rows."""
