"""The demo model of Headrace: its stories, its network, its training and its checks.

Nothing here is needed to serve the model. `python -m headrace_demo all --out DIR` makes the
checkpoint under `demo/model` again, from the story grammar to the measured figures.
"""
