"""Recovery of sparse students: fine-tuning under a fixed mask with the dense parent as teacher (SquareHead)."""
