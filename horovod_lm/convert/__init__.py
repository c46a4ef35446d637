"""Models of transformers to runs and back; docs/convert.md says what is kept and how."""
