"""How much of a model's quality speculative prefill keeps: tasks, methods, metrics and records."""
