"""The paper's experiments, run again: `stacey-dist reproduce NAME`."""
