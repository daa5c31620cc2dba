"""
Configurations and models. This folder travels to the Hub as remote code, which copies sibling files only: it stays flat
and imports nothing but torch, Transformers and its own files.
"""
