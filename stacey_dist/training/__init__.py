"""What the launchers are made of: settings, the run, the loop, the tasks."""
