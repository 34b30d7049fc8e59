"""Embedding tables of which only the active weights exist, and how these are chosen while training goes on."""
