"""EM Distillation, with the names of docs/algorithm.md. The algorithm knows no kernel or device."""
