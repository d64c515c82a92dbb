"""Data files and images to batches. Read image, tokenizer and chat first (a conversation to ids and labels), then what
reads a data file: formats (a file to records), tables, archives (for prepare), records (one record of any layout), samples,
checks (which of them are bad), then packing (the texts of one image in one row), batches, and features (what can take the
place of pixels)."""
