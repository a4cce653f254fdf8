"""Training drafts for a target (DistillSpec): modules, objective, the job in rounds, its checkpoints and report."""
