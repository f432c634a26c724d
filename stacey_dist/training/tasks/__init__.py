"""The two launchers' own tasks, language models and images: data, model, loss, evaluation and export."""
