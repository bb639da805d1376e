"""Attacks on methods that erase: other words, or embeddings, that bring back what is gone.

One file each; an attack takes (case, settings) and gives what is to be asked instead of the case's
prompt. `bench/attacked.py` lists them.
"""
