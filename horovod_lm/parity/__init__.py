"""Whether two backends are the same model and the same training, and where not if they aren't."""
