"""Networks as denoisers and scores: denoiser, noise schedules, sampler."""
