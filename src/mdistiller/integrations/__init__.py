"""A `Distiller` inside other trainers, and runs on a cluster; a module needs the package of its name."""
