"""Metrics of sets of samples, independent of the task.

`distance` and `neighbours` compare features. `detector` computes features of images, and
`reference` reads statistics of real images. `inception` and `clip` score images alone or with
their prompts. `evaluation` puts them together over batches and ranks.
"""
