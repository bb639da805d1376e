"""Attacks on methods that erase: ways to bring back what they erased.

One file each; an attack takes (case, settings) and gives what is to be asked instead of the case's
prompt, what the picture is drawn from, or an adapter to draw it with. `registry.py` lists them;
`settings.py` says how strong each is and whom it is open to, and has those attacks that are nothing
but conditions under which a method draws.
"""
