"""Engines that write a student's answers: their protocol, and one module for each engine."""
