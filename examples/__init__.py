"""Whole experiments made with the library, each a command: shapes (`make demo`), pretrain, crossval."""
