"""The settings of each command, declared once, and the flags made of them."""
