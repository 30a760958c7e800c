"""`DataRewriter`: self-alignment, guided alignment, fallback; what is kept, drawn in which order, and pushed."""
