"""Cross-validation on a table of image embeddings. Reading order: __main__, table, caption_space, language_model, folds."""
