"""Training: the loop, the optimizer, the trainer of a model, and the files of a run folder."""
