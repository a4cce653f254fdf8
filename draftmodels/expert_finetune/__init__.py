"""Experts for steering: plain supervised fine-tuning of a small model on prompts and answers."""
