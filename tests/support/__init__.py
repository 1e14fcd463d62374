"""What several test files share. Here is no test, and no test file imports from another one."""

from pathlib import Path

#: The checkout.
ROOT = Path(__file__).parents[2]
