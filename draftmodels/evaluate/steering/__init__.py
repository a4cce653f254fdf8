"""A steered model beside its base, its expert and a tuned base: what steering gains, what it costs."""
