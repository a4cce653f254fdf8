"""What training jobs have in common: recipes, budgets, checkpoints, processes, progress, metrics and report pages."""
