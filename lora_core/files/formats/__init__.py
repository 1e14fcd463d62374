"""Adapters in other tools' formats: one file each, behind one contract (`base.py`)."""
