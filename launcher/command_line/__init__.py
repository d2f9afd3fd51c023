"""Words and settings: from what was typed, the environment and files to values, and what is said of them."""
