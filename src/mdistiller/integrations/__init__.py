"""A `Distiller` inside other trainers, and runs on a cluster; each module imports the package it is named after."""
