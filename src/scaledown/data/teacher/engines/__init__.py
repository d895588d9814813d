"""The engines that run a teacher, a module each."""
