"""One room per op: its public function (__init__.py), its definition (reference.py), its fast backends beside it."""
