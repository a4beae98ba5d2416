"""`python -m emd_fast.config`: prints docs/configuration.md."""

from emd_fast.config.docs import markdown

print(markdown(), end="")
