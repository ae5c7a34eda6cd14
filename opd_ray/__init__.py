"""opd_ray: on-policy distillation of language models on Ray, kept stable (StableOPD).

Rooms: generate (student generators) → score (teacher, reference) → buffer → learn, and weights
back to the generators. Start reading at :mod:`opd_ray.pipeline`.
"""

__version__ = "0.1.0"
