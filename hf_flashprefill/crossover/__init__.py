"""From how many tokens on sparse prefill beats dense attention: ``min_seq_len="auto"``.

``known`` answers, from what was measured on this machine or else from a table; ``measure`` measures, when asked by
``warmup`` or by ``python -m hf_flashprefill.crossover``, never inside a prompt.
"""

from .known import AUTO, NEVER, Crossover, LayerShape, is_long_enough, min_seq_len_for, min_seq_len_of_model
from .measure import measure_crossover

__all__ = [
    "AUTO",
    "NEVER",
    "Crossover",
    "LayerShape",
    "is_long_enough",
    "measure_crossover",
    "min_seq_len_for",
    "min_seq_len_of_model",
]
