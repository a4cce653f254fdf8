"""Measuring drafts on held-out prompts through the serving engine: ``paceline evaluate draft``."""
