"""The procedural sprite world: scenes with exact ground truth, clips, questions, and the small dual encoder."""
