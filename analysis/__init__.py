"""What needs the model and a transcoder together."""
