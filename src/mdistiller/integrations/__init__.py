"""Bridges to other trainers and to clusters; each module needs the package that it is named after."""
