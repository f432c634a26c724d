"""Set before torch is loaded, in the tests' processes and in all that they start."""

import os

# Threads that wait for each other sleep: spinning, those of one process would take the cores from those of another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
