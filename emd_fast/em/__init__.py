"""EM Distillation, in the words of docs/algorithm.md. No kernel and no device in sight."""
