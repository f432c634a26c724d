"""Without a GPU and without a hub, whatever the machine has."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", **OFFLINE}
