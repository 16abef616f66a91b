"""Distilling torchvision's detectors."""
