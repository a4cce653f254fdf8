"""What fine-tuning jobs share: a trainable decoder, batches, the loss through the head, and the loop over steps."""
