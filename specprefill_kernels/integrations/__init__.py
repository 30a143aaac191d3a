"""Speculative prefill inside other inference stacks: one file or folder per stack, see docs/integrations.md.

Nothing is imported here: each stack is needed only by its own module.
"""
