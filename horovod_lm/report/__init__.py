"""The comparison's figures, its table, its charts and its page."""
