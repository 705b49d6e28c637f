"""What harvest and training will take, from the model's config alone."""
