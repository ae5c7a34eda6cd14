"""The workers: plain classes that :mod:`opd_ray.launch` turns into Ray actors."""
