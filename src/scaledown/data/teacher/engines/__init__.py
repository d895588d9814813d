"""The engines that run a teacher, one module for each."""
