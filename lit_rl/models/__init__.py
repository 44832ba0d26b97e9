"""Models: encoder (observation -> features), heads (features -> actions, values), the agent of both."""
