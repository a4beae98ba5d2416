"""What sets of samples are judged by, whatever the task: distances in a space of features, and what a detector says.

`distance` and `neighbours` compare features; `detector` makes them of images, `reference` reads what they are compared
with; `inception` and `clip` judge images alone, or with their prompts.
"""
