"""The version, alone in a file that a build can read without torch."""

__version__ = "0.2.0.dev0"
