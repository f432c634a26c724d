"""Marks of tests that need more than the oldest versions have."""

import pytest
import torch

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
MUON = pytest.param("muon", marks=needs_muon)
