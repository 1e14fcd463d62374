"""What needs transformers, imported when it is first asked for."""
