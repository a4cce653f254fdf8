"""Drafts that come with Paceline: folders in native form, found by ``server.models.bundled``. No code."""
