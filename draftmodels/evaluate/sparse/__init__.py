"""A sparse student beside its dense parent: what it lost, what it gained in speed, and how large it is."""
