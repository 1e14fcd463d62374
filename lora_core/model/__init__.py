"""Verbs on a whole model: inject, switch, merge, combine. Each is done or leaves the model as it was."""
