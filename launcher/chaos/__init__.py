"""Faults from outside while a recipe trains: does it end in the bits of the undisturbed run?"""
