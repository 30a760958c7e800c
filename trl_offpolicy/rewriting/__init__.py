"""
`DataRewriter`: self-alignment, guided alignment, fallback; what is kept, in which order it is drawn, and what is
    pushed.
"""
