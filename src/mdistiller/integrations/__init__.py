"""A `Distiller` inside other trainers; each module imports its framework, so none is imported here."""
