"""Does the installed transformers behave? ``python -m hf_flashprefill.support`` finds out.

Every kind of call in ``situations`` is made of a tiny random model of every family in ``families``, unpatched and, with
alpha=0, patched; ``matrix`` compares the numbers and reads the reasons of dense calls; ``table`` writes it down.
"""
