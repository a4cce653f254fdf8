"""The decoding room: pure tensor functions from logits to committed tokens, and the draft-free proposers."""
