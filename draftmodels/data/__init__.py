"""What drafts are trained on: prompts, token sequences, their files and their order. Everything follows from seeds."""
