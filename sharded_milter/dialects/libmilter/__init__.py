"""Milters made of classes with xxfi_ callbacks."""
