"""What an adapter is to be: its settings, and which names of modules they mean. Strings and numbers alone, no torch."""
