"""For every test: hypothesis judges results, never wall-clock."""

from hypothesis import settings

settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")
