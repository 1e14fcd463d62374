"""What is on disk: checkpoints, and adapters in PEFT's layout."""
