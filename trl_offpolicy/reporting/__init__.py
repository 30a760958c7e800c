"""Pages and tables of what the other rooms wrote to disk. Knows no models."""
