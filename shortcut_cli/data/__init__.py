"""Data on its way to a model: input files, documents, splits, shards and training windows."""
