"""The paper's experiments and the search for settings: `python -m experiments` in the repository's root."""
