"""``python -m eval.train_recall`` trains the small retrieval model that the harnesses and tests use by default."""
