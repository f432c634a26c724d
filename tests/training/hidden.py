"""Without a GPU and without a hub, whatever the machine has."""

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
