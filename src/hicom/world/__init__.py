"""The procedural sprite world: scenes with exact ground truth, rendered clips, questions, and the small dual encoder."""
