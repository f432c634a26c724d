"""The settings of the launchers, their defaults and allowed values, and how they are read from files and options."""
