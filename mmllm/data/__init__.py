"""Data files and images to batches: image and tokenizer, chat (conversations to ids and labels), formats (files to
records), samples (records to samples), checks (bad samples), packing (texts of one image in one row), batches, features
(what takes the place of pixels), processor_files."""
