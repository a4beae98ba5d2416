"""The trainer and what it is made of: networks, optimizers, average, checkpoints, batches."""
