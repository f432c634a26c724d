"""What a run reports: progress, metrics, plots, norms, profiles, samples, trackers, and the model card."""
