"""Peers' rules that are no training: written from their papers, a small file each."""
