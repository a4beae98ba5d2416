"""A run and its folder: training loop, best checkpoint, replay, study, signals, plan."""
